"""Secure sums: a server learns the sum of its members' vectors, and nothing of a single one.

`Member` is a client's side, `Tally` the server's; both take and give bytes and arrays, and the caller carries them. The
protocol, and who may know what, is in `protocol`.
"""

from fedproxy.privacy.sums.identity import Identity, drawn
from fedproxy.privacy.sums.member import Member
from fedproxy.privacy.sums.tally import Tally

__all__ = ["Identity", "Member", "Tally", "drawn"]
