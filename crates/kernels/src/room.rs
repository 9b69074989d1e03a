//! Memory for results that nobody has to clear first.

use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use crate::memory::with_room;

/// Numbers that tasks write piece by piece, each before it is read, so that nobody has to clear them first: on memory that
/// is not in a cache that is a pass less.
#[derive(Debug)]
pub struct Room {
    values: Vec<f32>,
    n: usize,
    n_written: AtomicUsize,
}

/// A part of a [`Room`]; writing takes it, so that no number is counted twice.
#[derive(Debug)]
pub struct Piece<'a> {
    values: &'a mut [MaybeUninit<f32>],
    n_written: &'a AtomicUsize,
}

impl Room {
    /// Room for `n` values.
    #[must_use]
    pub fn new(n: usize) -> Self {
        let n_written = AtomicUsize::new(0);
        let values = with_room(n);
        Self {
            values,
            n,
            n_written,
        }
    }

    /// All of it, to be written anew.
    pub fn whole(&mut self) -> Piece<'_> {
        *self.n_written.get_mut() = 0;
        Piece {
            values: &mut self.values.spare_capacity_mut()[..self.n],
            n_written: &self.n_written,
        }
    }

    /// The values.
    ///
    /// # Panics
    /// When a piece was not written.
    #[must_use]
    pub fn finish(mut self) -> Vec<f32> {
        let n_written = *self.n_written.get_mut();
        assert_eq!(n_written, self.n, "values written, values asked for");
        // SAFETY: pieces do not overlap, and each counts once, when all of it was written; so all of them were.
        unsafe { self.values.set_len(self.n) };
        self.values
    }
}

impl<'a> Piece<'a> {
    /// Number of values.
    #[must_use]
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The first `n` values, and the rest.
    ///
    /// # Panics
    /// When there are fewer.
    #[must_use]
    pub fn split_at(self, n: usize) -> (Self, Self) {
        let (first, rest) = self.values.split_at_mut(n);
        let n_written = self.n_written;
        let piece = |values| Self { values, n_written };
        (piece(first), piece(rest))
    }

    /// Pieces of `size` values, the last perhaps smaller.
    ///
    /// # Panics
    /// When `size` is 0.
    #[must_use]
    pub fn chunks(self, size: usize) -> Vec<Self> {
        let n_written = self.n_written;
        let pieces = self.values.chunks_mut(size);
        pieces.map(|values| Self { values, n_written }).collect()
    }

    /// As zeros.
    pub fn zeros(self) -> &'a mut [f32] {
        self.values.fill(MaybeUninit::new(0.0));
        // SAFETY: just written.
        unsafe { self.written() }
    }

    /// The room, for who writes it.
    pub(crate) fn room(&mut self) -> &mut [MaybeUninit<f32>] {
        self.values
    }

    /// The values that were written.
    ///
    /// # Safety
    /// All of them were.
    pub(crate) unsafe fn written(self) -> &'a mut [f32] {
        self.n_written.fetch_add(self.values.len(), Relaxed);
        // SAFETY: the caller's contract.
        unsafe { self.values.assume_init_mut() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_a_room_become_its_values() {
        let mut room = Room::new(10);
        let (first, rest) = room.whole().split_at(3);
        assert_eq!((first.len(), rest.is_empty()), (3, false));
        first.zeros().fill(1.0);
        for (i, piece) in rest.chunks(4).into_iter().enumerate() {
            piece.zeros().fill(i as f32 + 2.0);
        }
        let want = [1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 3.0, 3.0, 3.0];
        assert_eq!(room.finish(), want);
    }

    #[test]
    #[should_panic(expected = "values written")]
    fn a_room_with_a_piece_missing_is_not_finished() {
        let mut room = Room::new(10);
        room.whole().split_at(5).0.zeros();
        // Written again, from the start: it does not count twice.
        room.whole().split_at(5).0.zeros();
        let _ = room.finish();
    }
}
