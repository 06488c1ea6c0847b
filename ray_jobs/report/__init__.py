"""Report page of a run: results, method, and pictures. Pure: values in, HTML out.

The page is one self-contained file without scripts or external resources; light and dark mode follow the
reader's setting.
"""

from ray_jobs.report.measures import SubjectPictures
from ray_jobs.report.page import write_report
from ray_jobs.report.pictures import SHOWN_NEIGHBOURS, Memorisation, PictureRow, Strip, grid_image
from ray_jobs.report.svg import number
from ray_jobs.report.tables import Spent, TrialCost
from ray_jobs.report.verdict import beginning, closed_share, forgotten, headline

__all__ = [
    "SHOWN_NEIGHBOURS",
    "Memorisation",
    "PictureRow",
    "Spent",
    "Strip",
    "SubjectPictures",
    "TrialCost",
    "beginning",
    "closed_share",
    "grid_image",
    "forgotten",
    "headline",
    "number",
    "write_report",
]
