"""From files to domains, and from domains to training sequences and questions."""

from metarec_fast.data.batch import BatchShape, PackedBatch, PaddedBatch
from metarec_fast.data.controls import fingerprint, random_items, relabelled_copy, shuffled_order, shuffled_ties
from metarec_fast.data.domain import Cases, Domain, ReadReport, Sequences, Split
from metarec_fast.data.episodes import support_and_query
from metarec_fast.data.folder import find_domain, is_domain, load_domain, save_domain
from metarec_fast.data.importing import Progress, import_file
from metarec_fast.data.mixture import Mixture
from metarec_fast.data.prefetch import Prefetch, PrefetchError
from metarec_fast.data.read import DataWarning, read
from metarec_fast.data.sampler import BatchBuffers, Sampler, batch_buffers, draw
from metarec_fast.data.split import leave_one_out, limit_users, select_cases, time_cut
from metarec_fast.data.synthetic import SyntheticDomains, synthetic
from metarec_fast.data.transitions import TransitionKernel
from metarec_fast.data.vocabulary import Vocabulary

__all__ = [
    "BatchBuffers",
    "BatchShape",
    "Cases",
    "DataWarning",
    "Domain",
    "Mixture",
    "PackedBatch",
    "PaddedBatch",
    "Prefetch",
    "PrefetchError",
    "Progress",
    "ReadReport",
    "Sampler",
    "Sequences",
    "Split",
    "SyntheticDomains",
    "TransitionKernel",
    "Vocabulary",
    "batch_buffers",
    "draw",
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
    "support_and_query",
    "synthetic",
    "time_cut",
]
