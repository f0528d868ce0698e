"""Domains: interaction logs read from files, their splits, synthetic ones and controls."""

from metarec_fast.data.controls import fingerprint, random_items, relabelled_copy, shuffled_order, shuffled_ties
from metarec_fast.data.domain import Cases, Domain, ReadReport, Sequences, Split
from metarec_fast.data.io.folder import find_domain, is_domain, load_domain, save_domain
from metarec_fast.data.io.importing import Progress, import_file
from metarec_fast.data.io.read import DataWarning, read
from metarec_fast.data.split import leave_one_out, limit_users, select_cases, time_cut
from metarec_fast.data.synthetic import SyntheticDomains, synthetic
from metarec_fast.data.vocabulary import Vocabulary

__all__ = [
    "Cases",
    "DataWarning",
    "Domain",
    "Progress",
    "ReadReport",
    "Sequences",
    "Split",
    "SyntheticDomains",
    "Vocabulary",
    "find_domain",
    "fingerprint",
    "import_file",
    "is_domain",
    "leave_one_out",
    "limit_users",
    "load_domain",
    "random_items",
    "read",
    "relabelled_copy",
    "save_domain",
    "select_cases",
    "shuffled_order",
    "shuffled_ties",
    "synthetic",
    "time_cut",
]
