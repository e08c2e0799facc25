"""Scripts import this first: ctrl-C then shows no traceback of what they import next."""

import signal

if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until finish has a handler

from referee.flags import finish as finish  # noqa: E402
