"""From files to domains, and from domains to training sequences and questions."""

from metarec_fast.data.domain import Cases, Domain, ReadReport, Sequences, Split
from metarec_fast.data.read import read
from metarec_fast.data.split import leave_one_out, limit_users, time_cut
from metarec_fast.data.synthetic import SyntheticDomains, synthetic
from metarec_fast.data.vocabulary import Vocabulary

__all__ = [
    "Cases",
    "Domain",
    "ReadReport",
    "Sequences",
    "Split",
    "SyntheticDomains",
    "Vocabulary",
    "leave_one_out",
    "limit_users",
    "read",
    "synthetic",
    "time_cut",
]
