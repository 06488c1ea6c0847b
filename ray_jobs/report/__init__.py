"""The page that a run leaves behind: what was found, how, and the pictures. Pure: values in, HTML out.

One self-contained file: no script, nothing fetched, light and dark by the reader's own setting.
"""

from ray_jobs.report.measures import SubjectPictures
from ray_jobs.report.page import write_report
from ray_jobs.report.pictures import SHOWN_NEIGHBOURS, Memorisation, PictureRow, Strip, grid_image
from ray_jobs.report.svg import number
from ray_jobs.report.tables import Spent, TrialCost
from ray_jobs.report.verdict import closed_share, headline

__all__ = [
    "SHOWN_NEIGHBOURS",
    "Memorisation",
    "PictureRow",
    "Spent",
    "Strip",
    "SubjectPictures",
    "TrialCost",
    "closed_share",
    "grid_image",
    "headline",
    "number",
    "write_report",
]
