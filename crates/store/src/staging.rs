//! Memory that experts are read into before they are made: a ring of equal buffers, each for one expert.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use crate::error::StoreError;
use crate::expert::ExpertId;
use crate::form::Piece;
use crate::reader::{ALIGN, Completion, OpenFile, Reader, Request, aligned};

/// The buffers.
#[derive(Debug)]
pub(crate) struct Staging {
    buffers: Vec<Buffer>,
    n_bytes: usize,
    request_bytes: usize,
}

#[derive(Debug)]
struct Buffer {
    state: State,
    /// All of it, unless parts are being read.
    memory: BytesMut,
    parts: Vec<Part>,
    /// Where each piece of the expert begins in the memory, and its length.
    pieces: Vec<(usize, usize)>,
    n_left: usize,
    failure: Option<StoreError>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    /// Read, or being read, for `expert`; a pass waits for it if it is `wanted`.
    Holds {
        expert: ExpertId,
        wanted: bool,
    },
    /// Being read for nobody.
    Abandoned,
}

/// A part of the memory that is lent to a request.
#[derive(Debug, Default)]
struct Part {
    memory: Option<BytesMut>,
    file: usize,
    offset: u64,
    /// Bytes from `offset` that must come.
    n_needed: usize,
}

/// Bytes of a buffer that holds `pieces`, wherever they lie in their files.
pub(crate) fn buffer_bytes(pieces: &[Piece]) -> usize {
    pieces
        .iter()
        .map(|piece| OpenFile::window(&piece.range).1)
        .sum()
}

impl Staging {
    /// `n_buffers` of `n_bytes` each, read in requests of up to `request_bytes`.
    pub(crate) fn new(n_buffers: usize, n_bytes: usize, request_bytes: usize) -> Self {
        let n_bytes = n_bytes.next_multiple_of(ALIGN);
        let buffer = || Buffer {
            state: State::Free,
            memory: aligned(n_bytes),
            parts: Vec::new(),
            pieces: Vec::new(),
            n_left: 0,
            failure: None,
        };
        Self {
            buffers: (0..n_buffers).map(|_| buffer()).collect(),
            n_bytes,
            request_bytes: request_bytes.max(ALIGN) / ALIGN * ALIGN,
        }
    }

    /// How many there are.
    pub(crate) fn n_buffers(&self) -> usize {
        self.buffers.len()
    }

    /// The buffer that holds `expert`, or will.
    pub(crate) fn of(&self, expert: ExpertId) -> Option<usize> {
        let holds =
            |buffer: &Buffer| matches!(buffer.state, State::Holds { expert: e, .. } if e == expert);
        self.buffers.iter().position(holds)
    }

    pub(crate) fn is_ready(&self, buffer: usize) -> bool {
        self.buffers[buffer].n_left == 0
    }

    /// Says that a pass waits for what the buffer holds.
    pub(crate) fn want(&mut self, buffer: usize) {
        if let State::Holds { wanted, .. } = &mut self.buffers[buffer].state {
            *wanted = true;
        }
    }

    /// Whether something is being read that a pass waits for.
    pub(crate) fn awaits(&self) -> bool {
        self.buffers.iter().any(|buffer| {
            buffer.n_left > 0 && matches!(buffer.state, State::Holds { wanted: true, .. })
        })
    }

    /// Says that no pass waits for anything.
    pub(crate) fn want_nothing(&mut self) {
        for buffer in &mut self.buffers {
            if let State::Holds { wanted, .. } = &mut buffer.state {
                *wanted = false;
            }
        }
    }

    /// Forgets what is held and not wanted where `is_stale` says so; how many these were.
    pub(crate) fn forget(&mut self, is_stale: impl Fn(ExpertId) -> bool) -> u64 {
        let mut n = 0;
        for buffer in &mut self.buffers {
            if let State::Holds {
                expert,
                wanted: false,
            } = buffer.state
                && is_stale(expert)
            {
                n += 1;
                buffer.state = match buffer.n_left {
                    0 => State::Free,
                    _ => State::Abandoned,
                };
            }
        }
        n
    }

    /// A free buffer.
    pub(crate) fn free(&self) -> Option<usize> {
        self.buffers
            .iter()
            .position(|buffer| buffer.state == State::Free)
    }

    /// Frees a buffer whose expert nobody waits for, if there is one that has been read.
    pub(crate) fn reclaim(&mut self) -> bool {
        let idle = self.buffers.iter_mut().find(|buffer| {
            buffer.n_left == 0 && matches!(buffer.state, State::Holds { wanted: false, .. })
        });
        match idle {
            Some(buffer) => {
                buffer.state = State::Free;
                true
            }
            None => false,
        }
    }

    /// Begins to read `expert` into the free buffer `at`.
    pub(crate) fn read(
        &mut self,
        at: usize,
        (expert, wanted): (ExpertId, bool),
        pieces: &[Piece],
        files: &[OpenFile],
        reader: &mut dyn Reader,
    ) {
        let request_bytes = self.request_bytes;
        let buffer = &mut self.buffers[at];
        buffer.state = State::Holds { expert, wanted };
        buffer.failure = None;
        buffer.parts.clear();
        buffer.pieces.clear();
        let mut from = 0;
        for piece in pieces {
            let (start, n_bytes) = OpenFile::window(&piece.range);
            let length = (piece.range.end - piece.range.start) as usize;
            buffer
                .pieces
                .push((from + (piece.range.start - start) as usize, length));
            from += n_bytes;
            for offset in (0..n_bytes).step_by(request_bytes) {
                let n = request_bytes.min(n_bytes - offset);
                let offset = start + offset as u64;
                let tag = (at as u64) << 32 | buffer.parts.len() as u64;
                reader.submit(Request {
                    tag,
                    file: Arc::clone(files[piece.file].file()),
                    offset,
                    memory: buffer.memory.split_to(n),
                });
                buffer.parts.push(Part {
                    memory: None,
                    file: piece.file,
                    offset,
                    n_needed: (piece.range.end - offset).min(n as u64) as usize,
                });
            }
        }
        buffer.n_left = buffer.parts.len();
    }

    /// Takes back what a request was lent.
    pub(crate) fn complete(&mut self, completion: Completion, files: &[OpenFile]) {
        let (at, part) = (
            (completion.tag >> 32) as usize,
            completion.tag as u32 as usize,
        );
        let buffer = &mut self.buffers[at];
        let part = &mut buffer.parts[part];
        part.memory = Some(completion.memory);
        buffer.n_left -= 1;
        if let State::Holds { expert, .. } = buffer.state
            && buffer.failure.is_none()
        {
            let path = || files[part.file].path().to_owned();
            buffer.failure = match completion.result {
                Ok(n) if n < part.n_needed => Some(StoreError::Truncated {
                    path: path(),
                    end: part.offset + n as u64,
                    needed: part.offset + part.n_needed as u64,
                    expert,
                }),
                Ok(_) => None,
                Err(source) => Some(StoreError::Read {
                    path: path(),
                    offset: part.offset,
                    n_bytes: part.n_needed,
                    expert,
                    source,
                }),
            };
        }
        if buffer.n_left == 0 {
            buffer.join(self.n_bytes);
        }
    }

    /// Takes what was read out of a buffer that is ready: all of its memory, and the pieces in it.
    pub(crate) fn take(
        &mut self,
        at: usize,
        pieces: &mut Vec<Bytes>,
        files: &[OpenFile],
    ) -> Result<Bytes, StoreError> {
        let buffer = &mut self.buffers[at];
        for part in &buffer.parts {
            let file = &files[part.file];
            file.read_done(part.offset..part.offset + part.n_needed as u64);
            if let Err(changed) = file.check_unchanged() {
                // What was read may be half of the old and half of the new.
                buffer.failure.get_or_insert(changed);
            }
        }
        if let Some(failure) = buffer.failure.take() {
            buffer.state = State::Free;
            return Err(failure);
        }
        let memory = std::mem::take(&mut buffer.memory).freeze();
        pieces.clear();
        let slices = buffer
            .pieces
            .iter()
            .map(|(from, length)| memory.slice(*from..from + length));
        pieces.extend(slices);
        Ok(memory)
    }

    /// Puts the memory back after [`Staging::take`]; the buffer is free again.
    pub(crate) fn put(&mut self, at: usize, memory: Bytes) {
        let buffer = &mut self.buffers[at];
        buffer.memory = memory
            .try_into_mut()
            .unwrap_or_else(|_| aligned(self.n_bytes));
        buffer.state = State::Free;
    }
}

impl Buffer {
    /// Joins the parts, which are neighbours in one piece of memory.
    fn join(&mut self, n_bytes: usize) {
        let mut parts = self.parts.iter_mut().filter_map(|part| part.memory.take());
        if let Some(mut memory) = parts.next() {
            for part in parts {
                memory.unsplit(part);
            }
            memory.unsplit(std::mem::take(&mut self.memory));
            self.memory = memory;
        }
        debug_assert_eq!(self.memory.len(), n_bytes, "every part came back");
        if self.state == State::Abandoned {
            self.state = State::Free;
        }
    }
}
