//! Room for keys and values: who may take how much of the memory that all sessions share.

use super::lane::Rooms;
use super::slot::Slot;

/// The memory of keys and values.
#[derive(Clone, Copy, Debug)]
pub(super) struct KvLimits {
    /// The most bytes of all sessions and of all blocks that are kept.
    pub(super) limit: usize,
    /// Bytes of one session that is full, and its tokens.
    pub(super) session: usize,
    pub(super) n_ctx: usize,
}

impl KvLimits {
    /// Tokens that fit.
    pub(super) fn n_tokens(self) -> f64 {
        self.n_ctx as f64 * (self.limit as f64 / self.session.max(1) as f64)
    }
}

/// Cuts `pieces`, the tokens that slots are to read, to what there is memory for: jobs that began earlier come first. Blocks that
/// nobody uses are given up, and what slots without a job hold. A job begins, or begins again, when there is room for all
/// that it has to read.
pub(super) fn make_room(slots: &mut [Slot], rooms: &mut Rooms, kv: KvLimits, pieces: &mut [usize]) {
    let mut order: Vec<usize> = (0..slots.len()).filter(|slot| pieces[*slot] > 0).collect();
    order.sort_by_key(|slot| slots[*slot].since());
    // What the others of this pass will take.
    let mut promised = 0;
    for at in order {
        if let Some(n) = slots[at].n_to_admit() {
            let whole = slots[at].bytes_to_take(n);
            if !is_free(slots, rooms, kv, promised + whole) {
                pieces[at] = 0;
                continue;
            }
            slots[at].admit();
        }
        let mut n = pieces[at];
        while n > 0 && !is_free(slots, rooms, kv, promised + slots[at].bytes_to_take(n)) {
            n = one_block_less(n, slots[at].n_to_block_end());
        }
        promised += slots[at].bytes_to_take(n);
        pieces[at] = n;
    }
}

/// The most tokens below `n` that end with a block, of which the first has `n_first` left; 0 when there are none.
fn one_block_less(n: usize, n_first: usize) -> usize {
    match n.checked_sub(n_first + 1) {
        None => 0,
        Some(beyond) => n_first + beyond / cadre_engine::KV_BLOCK * cadre_engine::KV_BLOCK,
    }
}

/// Whether so many bytes can be taken, after giving up what nobody uses.
fn is_free(slots: &mut [Slot], rooms: &mut Rooms, kv: KvLimits, n_bytes: usize) -> bool {
    loop {
        let over = (rooms.memory.n_bytes() + n_bytes).saturating_sub(kv.limit);
        if over == 0 {
            return true;
        }
        let before = rooms.memory.n_bytes();
        rooms.prefixes.free(over);
        if rooms.memory.n_bytes() < before {
            continue;
        }
        let idle = slots
            .iter_mut()
            .filter(|slot| slot.is_free() && slot.holds_any());
        match idle.min_by_key(|slot| slot.used()) {
            Some(slot) => slot.give_up(),
            None => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_cut_at_the_ends_of_blocks() {
        assert_eq!(one_block_less(500, 64), 448);
        assert_eq!(one_block_less(448, 64), 384);
        assert_eq!(one_block_less(64, 64), 0);
        assert_eq!(one_block_less(65, 64), 64);
        assert_eq!(one_block_less(100, 10), 74);
        assert_eq!(one_block_less(74, 10), 10);
        assert_eq!(one_block_less(10, 10), 0);
        assert_eq!(one_block_less(1, 3), 0);
    }
}
