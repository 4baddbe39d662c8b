//! A crash-safe qcow2 engine for backup images.
