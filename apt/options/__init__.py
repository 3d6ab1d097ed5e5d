"""Every option, declared once: default, help, range, and the methods that use it. No torch."""

from apt.options.declaration import (
    Declared,
    Option,
    Options,
    flags_of,
    option,
    options,
    warn_renamed,
)
from apt.options.files import read_options, write_options
from apt.options.others import (
    ANY_MODEL,
    CheckRun,
    ConvertRun,
    ExportRun,
    InspectRun,
    PackRun,
    ReapplyRun,
    UnpackRun,
    VerifyRun,
)
from apt.options.prune import (
    PRESETS,
    Effort,
    ModelRun,
    Preset,
    PruneOptions,
    PruneRun,
    SolveOptions,
)
from apt.options.recover import RecoverOptions, RecoverRun
from apt.options.shared import (
    ACCURACY,
    MODEL,
    OUTPUT,
    PANELS,
    RUNNING,
    SELECTION,
    SIZE,
    TEXT,
    TRAINING,
    Activations,
    AdapterOptions,
    CalibrationOptions,
    Compute,
    ComputeOptions,
    ConfigOptions,
    DeviceOptions,
    DryRunOptions,
    DtypeOptions,
    MachineName,
    MaskOptions,
    MeasuringOptions,
    MethodOptions,
    ModelOptions,
    OutputOptions,
    PatternOptions,
    PrintingOptions,
    RemoteOptions,
    SampleOptions,
    StreamOptions,
    TokenizerOptions,
    UnitOptions,
    WritingOptions,
    check_seed,
    check_windows,
)
from apt.options.shrink import GENERATION, Budget, Mode, ShrinkOptions, ShrinkRun

__all__ = [
    "ACCURACY", "ANY_MODEL", "GENERATION", "MODEL", "OUTPUT", "PANELS", "PRESETS", "RUNNING",
    "SELECTION", "SIZE", "TEXT", "TRAINING", "Activations", "AdapterOptions", "Budget",
    "CalibrationOptions", "CheckRun", "Compute", "ComputeOptions", "ConfigOptions", "ConvertRun",
    "Declared", "DeviceOptions", "DryRunOptions", "DtypeOptions", "Effort", "ExportRun",
    "InspectRun", "MachineName", "MaskOptions",
    "MeasuringOptions", "MethodOptions", "Mode", "ModelOptions", "ModelRun", "Option", "Options",
    "OutputOptions", "PackRun", "PatternOptions", "Preset", "PrintingOptions", "PruneOptions",
    "PruneRun", "ReapplyRun", "RecoverOptions", "RecoverRun", "RemoteOptions", "SampleOptions",
    "ShrinkOptions", "ShrinkRun", "SolveOptions", "StreamOptions", "TokenizerOptions",
    "UnitOptions", "UnpackRun", "VerifyRun", "WritingOptions", "check_seed", "check_windows",
    "flags_of", "option", "options", "read_options", "warn_renamed", "write_options",
]  # fmt: skip
