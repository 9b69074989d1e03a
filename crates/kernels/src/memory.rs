//! Memory for weights: large pages where the system has them.

use memmap2::MmapMut;

/// Bytes that start as zeros.
pub(crate) struct Memory(MmapMut);

impl Memory {
    /// `n_bytes` of memory; `None` when the system has none left, or for none.
    pub(crate) fn new(n_bytes: usize) -> Option<Self> {
        let memory = MmapMut::map_anon(n_bytes).ok()?;
        // Fewer misses in the table of pages; where it fails, pages are small.
        #[cfg(target_os = "linux")]
        let _ = memory.advise(memmap2::Advice::HugePage);
        Some(Self(memory))
    }
}

impl AsRef<[u8]> for Memory {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl AsMut<[u8]> for Memory {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}
