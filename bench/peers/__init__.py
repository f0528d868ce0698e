"""The usual ways to do what metarec_fast does, written for comparison."""
