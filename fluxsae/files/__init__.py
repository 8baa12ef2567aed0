"""Whole files, JSON, CSV, YAML, hashes, and a lock for each folder. Nothing of ours is imported here."""

from fluxsae.files.bundled_files import bundled, config_file, weights_folder
from fluxsae.files.folder_lock import FolderInUseError, FolderLock
from fluxsae.files.hashes import hash_of_ends, sha256_file
from fluxsae.files.json_files import hash_json, read_json, sealed, unsealed, write_json
from fluxsae.files.seeds import derived_seed
from fluxsae.files.suggestions import unknown_key
from fluxsae.files.tables import read_columns, read_csv, write_columns, write_csv
from fluxsae.files.whole import naming, put_in_place, remove_parts, whole_file, write_text
from fluxsae.files.yaml_files import read_yaml

__all__ = [
    "FolderInUseError",
    "FolderLock",
    "bundled",
    "config_file",
    "derived_seed",
    "hash_json",
    "hash_of_ends",
    "naming",
    "put_in_place",
    "read_columns",
    "read_csv",
    "read_json",
    "read_yaml",
    "remove_parts",
    "sealed",
    "sha256_file",
    "unknown_key",
    "unsealed",
    "weights_folder",
    "whole_file",
    "write_columns",
    "write_csv",
    "write_json",
    "write_text",
]
