"""Pictures, tables and files about a run: plain arrays in, pixels and files out."""

from camtrain.reporting.case_log import CaseRow, read_cases, write_cases
from camtrain.reporting.case_picture import CasePicture, compose_case, compose_overview
from camtrain.reporting.error_gallery import ErrorCard, error_gallery_html, write_error_gallery
from camtrain.reporting.montage import Row, compose_montage, side_by_side
from camtrain.reporting.nifti import map_affine, resample_to, save_map
from camtrain.reporting.opening import open_loggers
from camtrain.reporting.overlays import shared_scale, window_of
from camtrain.reporting.panels import compose_grid, compose_panel
from camtrain.reporting.patience import Patience, PatientSink, Unwritten, file_failure
from camtrain.reporting.run_dir import RunDir, Score
from camtrain.reporting.run_report import RunReport, write_run_comparison, write_run_report
from camtrain.reporting.score_table import as_csv, as_markdown, as_rows, comparison_table, score_table
from camtrain.reporting.seed_plot import plot_seeds
from camtrain.reporting.segmenting import dice, segment, segmentation_level
from camtrain.reporting.sinks import Sink, describe_loggers, sinks_for
from camtrain.reporting.slices import geometry, largest_section, peak, telling_point

__all__ = [
    "CasePicture",
    "CaseRow",
    "ErrorCard",
    "Patience",
    "PatientSink",
    "Row",
    "RunDir",
    "RunReport",
    "Score",
    "Sink",
    "Unwritten",
    "as_csv",
    "as_markdown",
    "as_rows",
    "comparison_table",
    "compose_case",
    "compose_grid",
    "compose_montage",
    "compose_overview",
    "compose_panel",
    "describe_loggers",
    "dice",
    "error_gallery_html",
    "file_failure",
    "geometry",
    "largest_section",
    "map_affine",
    "open_loggers",
    "peak",
    "plot_seeds",
    "read_cases",
    "resample_to",
    "save_map",
    "score_table",
    "segment",
    "segmentation_level",
    "shared_scale",
    "side_by_side",
    "sinks_for",
    "telling_point",
    "window_of",
    "write_cases",
    "write_error_gallery",
    "write_run_comparison",
    "write_run_report",
]
