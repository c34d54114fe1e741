"""Checkpoints that survive kills, full disks and flipped bits. No pickle anywhere."""

from pyper.checkpoint.atomic import (
    check_free_space,
    format_bytes,
    remove_folder,
    storage_errors,
    sweep,
    write_folder_atomically,
    write_json_atomically,
)
from pyper.checkpoint.lock import folder_lock
from pyper.checkpoint.manifest import (
    MANIFEST,
    FileEntry,
    Json,
    Manifest,
    hash_file,
    read_manifest,
    verify_manifest,
    write_manifest,
)
from pyper.checkpoint.rng import capture_rng, restore_rng
from pyper.checkpoint.state import flatten_state, same_state, unflatten_state
from pyper.checkpoint.store import (
    Checkpoint,
    CheckpointStore,
    load_checkpoint,
    load_checkpoint_state,
    load_model_tensors,
)
from pyper.checkpoint.tensors import read_tensors, write_tensors

__all__ = [
    "MANIFEST",
    "Checkpoint",
    "CheckpointStore",
    "FileEntry",
    "Json",
    "Manifest",
    "capture_rng",
    "check_free_space",
    "flatten_state",
    "folder_lock",
    "format_bytes",
    "hash_file",
    "load_checkpoint",
    "load_checkpoint_state",
    "load_model_tensors",
    "read_manifest",
    "read_tensors",
    "remove_folder",
    "restore_rng",
    "same_state",
    "storage_errors",
    "sweep",
    "unflatten_state",
    "verify_manifest",
    "write_folder_atomically",
    "write_json_atomically",
    "write_manifest",
    "write_tensors",
]
