"""The one table of GPUs: what the makers' data sheets say of each."""

from typing import NamedTuple


class Card(NamedTuple):
    """Rates are peaks; bandwidths are per direction."""

    name: str  # as torch.cuda.get_device_name gives it
    capability: tuple[int, int]
    processors: int
    memory_bytes: int
    shared_bytes: int  # most that one program may have
    bf16_tflops: float  # dense; fp8 twice that
    fp32_tflops: float
    memory_gb_per_s: float
    link_gb_per_s: float  # to the other cards of its machine


CARDS = {
    "A100": Card("NVIDIA A100-SXM4-80GB", (8, 0), 108, 85_097_971_712, 166_912, 312, 19.5, 2039,
                 300),
    "H100": Card("NVIDIA H100 80GB HBM3", (9, 0), 132, 85_017_755_648, 232_448, 989, 67, 3350, 450),
    "H200": Card("NVIDIA H200", (9, 0), 132, 150_109_880_320, 232_448, 989, 67, 4800, 450),
    "GH200": Card("NVIDIA GH200 480GB", (9, 0), 132, 96_000_000_000, 232_448, 989, 67, 4000, 450),
    "B200": Card("NVIDIA B200", (10, 0), 148, 180_000_000_000, 232_448, 2250, 75, 8000, 900),
    "L40S": Card("NVIDIA L40S", (8, 9), 142, 48_000_000_000, 101_376, 362, 91.6, 864, 32),
    "4090": Card("NVIDIA GeForce RTX 4090", (8, 9), 128, 25_386_352_640, 101_376, 165, 82.6, 1008,
                 32),
}  # fmt: skip
# A name with one of these words is a variant of a card of the table, whose peak is not known.
OTHER_KINDS = {"MIG", "Laptop", "NVL", "PCIe", "PCIE", "Max", "D"}


def card_of(device_name: str) -> Card | None:
    """The card that torch calls so; None for one that CARDS lacks."""
    words = device_name.replace("-", " ").split()
    known = [card for key, card in CARDS.items() if key in words]
    return known[-1] if known and not OTHER_KINDS.intersection(words) else None
