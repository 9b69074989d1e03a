//! Mapping a file into memory as shared, read-only bytes.

use std::fs::File;
use std::path::Path;

use bytes::Bytes;

use crate::error::{CheckpointError, Result};

/// Maps `path` read-only. Slices of the result share the map and keep it alive; nothing is read until it is touched.
pub(crate) fn map_file(path: &Path) -> Result<Bytes> {
    let file = File::open(path).map_err(|source| CheckpointError::io("open", path, source))?;
    // SAFETY: the map is only read. The operating system cannot stop another process from truncating the file
    // meanwhile; as for every program that maps model files, that is outside of what can be defended against, and
    // documented for `Checkpoint::open`.
    #[expect(unsafe_code, reason = "mapping a file is the purpose of this function")]
    let map = unsafe { memmap2::Mmap::map(&file) };
    let map = map.map_err(|source| CheckpointError::io("map", path, source))?;
    Ok(Bytes::from_owner(map))
}
