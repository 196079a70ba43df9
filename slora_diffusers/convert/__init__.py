"""To and from ordinary LoRAs: export, compress, merge."""

from .compress import CompressReport, compress_lora
from .export import ExportReport, export_lora
from .merge import MergeReport, merge_serial_lora

__all__ = [
    "CompressReport",
    "ExportReport",
    "MergeReport",
    "compress_lora",
    "export_lora",
    "merge_serial_lora",
]
