"""What a checkpoint can do: samples and HellaSwag."""
