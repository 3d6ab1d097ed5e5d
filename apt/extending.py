"""The public names for plugins, beside `apt.adapter`, `apt.solver` and `apt.hookspecs`.

These are the interfaces of methods, choices of groups and blocks, allocations, recoveries, formats
and texts, helpers for writing them, and the functions with which a command opens a model. A name is
imported on its first use, so that a method does not wait for the libraries of a recovery.
"""

from typing import TYPE_CHECKING

from apt.lazy_names import lazy_names

if TYPE_CHECKING:
    from apt.adapter.recording import eval_mode
    from apt.calibration.batches import Batch, enter
    from apt.checkpoints.exporting import Export, Exportable, Exported
    from apt.checkpoints.formats import Checkpoint, find_file
    from apt.checkpoints.load import load, load_tokenizer, open_skeleton
    from apt.checkpoints.opened import Opened
    from apt.checkpoints.quantised import ExpandedTensor, QuantisedCheckpoint, Slices
    from apt.engine.machine import choose_device, read_dtype
    from apt.engine.prepare import capped
    from apt.engine.text import check_same_vocabulary
    from apt.fit.levels import FileForm, Level
    from apt.inputs.items import Item
    from apt.locations.model_source import Source
    from apt.planning.allocation import Allocation, Unallocated, sparsity_of, unstructured
    from apt.planning.plan import Plan, PlannedBlock, PlannedSite
    from apt.plugin.doctor import Finding, try_import
    from apt.plugin.documents import Conversation, Document
    from apt.plugin.registry import Registry, registry
    from apt.pruning.expert_choice import ExpertChoice, lowest_scores
    from apt.pruning.layer import Method
    from apt.pruning.routed_experts import RoutedExperts
    from apt.recovery.objective import Loss, next_token_loss
    from apt.recovery.teacher import Teacher, divergence, relative_error
    from apt.recovery.trainable import Recovery, Trainable, Unrecovered, train_only
    from apt.shrinking.skipping import loss_without
    from apt.shrinking.structure_choice import BlockChoice, GroupScores
    from apt.text.datasets import Split, hub_documents
    from apt.text.files import read_file
    from apt.text.ids import check_vocabulary
    from apt.text.language_model import language_model

__all__ = [
    "Allocation", "Batch", "BlockChoice", "Checkpoint", "Conversation", "Document",
    "ExpandedTensor", "ExpertChoice", "Export", "Exportable", "Exported", "FileForm", "Finding",
    "GroupScores", "Item", "Level", "Loss", "Method", "Opened", "Plan", "PlannedBlock",
    "PlannedSite", "QuantisedCheckpoint", "Recovery", "Registry", "RoutedExperts", "Slices",
    "Source", "Split", "Teacher", "Trainable", "Unallocated", "Unrecovered", "capped",
    "check_same_vocabulary", "check_vocabulary", "choose_device", "divergence", "enter",
    "eval_mode", "find_file", "hub_documents", "language_model", "load", "load_tokenizer",
    "loss_without", "lowest_scores", "next_token_loss", "open_skeleton", "read_dtype", "read_file",
    "registry", "relative_error", "sparsity_of", "train_only", "try_import", "unstructured",
]  # fmt: skip
__getattr__ = lazy_names(__name__, {
    "apt.adapter.recording": ("eval_mode",),
    "apt.calibration.batches": ("Batch", "enter"),
    "apt.checkpoints.exporting": ("Export", "Exportable", "Exported"),
    "apt.checkpoints.formats": ("Checkpoint", "find_file"),
    "apt.checkpoints.load": ("load", "load_tokenizer", "open_skeleton"),
    "apt.checkpoints.opened": ("Opened",),
    "apt.checkpoints.quantised": ("ExpandedTensor", "QuantisedCheckpoint", "Slices"),
    "apt.engine.machine": ("choose_device", "read_dtype"),
    "apt.engine.prepare": ("capped",),
    "apt.engine.text": ("check_same_vocabulary",),
    "apt.fit.levels": ("FileForm", "Level"),
    "apt.inputs.items": ("Item",),
    "apt.text.ids": ("check_vocabulary",),
    "apt.locations.model_source": ("Source",),
    "apt.planning.allocation": ("Allocation", "Unallocated", "sparsity_of", "unstructured"),
    "apt.planning.plan": ("Plan", "PlannedBlock", "PlannedSite"),
    "apt.plugin.documents": ("Conversation", "Document"),
    "apt.plugin.doctor": ("Finding", "try_import"),
    "apt.plugin.registry": ("Registry", "registry"),
    "apt.pruning.expert_choice": ("ExpertChoice", "lowest_scores"),
    "apt.pruning.layer": ("Method",),
    "apt.pruning.routed_experts": ("RoutedExperts",),
    "apt.recovery.teacher": ("Teacher", "divergence", "relative_error"),
    "apt.recovery.objective": ("Loss", "next_token_loss"),
    "apt.recovery.trainable": ("Recovery", "Trainable", "Unrecovered", "train_only"),
    "apt.shrinking.structure_choice": ("BlockChoice", "GroupScores"),
    "apt.shrinking.skipping": ("loss_without",),
    "apt.text.datasets": ("Split", "hub_documents"),
    "apt.text.files": ("read_file",),
    "apt.text.language_model": ("language_model",),
})  # fmt: skip
