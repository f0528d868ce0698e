"""From files to domains, and from domains to training sequences and questions."""

from metarec_fast.data.domain import Cases, Domain, ReadReport, Sequences, Split
from metarec_fast.data.folder import is_domain, load_domain, save_domain
from metarec_fast.data.importing import Progress, import_file
from metarec_fast.data.read import read
from metarec_fast.data.sampler import PackedBatch, Sampler
from metarec_fast.data.split import leave_one_out, limit_users, time_cut
from metarec_fast.data.synthetic import SyntheticDomains, synthetic
from metarec_fast.data.transitions import TransitionKernel
from metarec_fast.data.vocabulary import Vocabulary

__all__ = [
    "Cases",
    "Domain",
    "PackedBatch",
    "Progress",
    "ReadReport",
    "Sampler",
    "Sequences",
    "Split",
    "SyntheticDomains",
    "TransitionKernel",
    "Vocabulary",
    "import_file",
    "is_domain",
    "leave_one_out",
    "limit_users",
    "load_domain",
    "read",
    "save_domain",
    "synthetic",
    "time_cut",
]
