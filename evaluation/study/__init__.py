"""`cud study`: many runs, compared where they have kept equally much.

options -> grid (which cells) -> pool (how they run) and cell (what one does) -> runs (what they left) -> report.
`engine` goes all the way to the runs, also from Python; `command` is `cud study`.
"""
