//! What a pass computes: who generates gets a token, and prompts share the rest.

/// Of the tokens of a pass, the most that are of prompts while somebody generates.
const PROMPT_SHARE: usize = 4;
/// Tokens of prompts that a matrix sees at least: a pass with 8 more takes hardly longer than one without.
const PROMPT_ROWS: usize = 8;
/// Passes in which as many tokens of prompts as are left would be read, if there came no more; so that long prompts go on faster than short ones.
const PROMPT_PASSES: usize = 64;

/// Rows of prompts in a pass in which somebody generates: they bound how long a token waits for other people's prompts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RowsBeside {
    least: usize,
    most: usize,
}

impl RowsBeside {
    /// Always as many.
    pub(super) fn fixed(n: usize) -> Self {
        // A prompt of two sessions goes on by two rows.
        let n = n.max(2);
        Self { least: n, most: n }
    }

    /// As suits a model. All rows meet a dense matrix (no experts, and 0 of them picked), but of experts each only `top_k` of
    /// `n_experts`.
    pub(super) fn of((n_experts, top_k): (usize, usize), n_tokens: usize) -> Self {
        let n_experts = n_experts.max(1);
        let per_row = n_experts.div_ceil(top_k.clamp(1, n_experts));
        let most = (n_tokens / PROMPT_SHARE).max(2);
        Self {
            least: (PROMPT_ROWS * per_row).min(most),
            most,
        }
    }

    /// Of `left` that prompts need.
    fn rows(self, left: usize) -> usize {
        left.div_ceil(PROMPT_PASSES).clamp(self.least, self.most)
    }
}

/// What a slot could do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Need {
    /// Tokens that it could read; 1 for a slot that generates.
    pub(crate) n_tokens: usize,
    /// Rows of the pass that a token takes.
    pub(crate) n_lanes: usize,
    /// Its prompt is read.
    pub(crate) generates: bool,
    /// The logits of every token are wanted.
    pub(crate) scores: bool,
    /// When it got its slot; earlier ones have smaller numbers.
    pub(crate) since: u64,
}

/// What a pass may hold.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PassLimits {
    /// Rows; at least two for every slot.
    pub(crate) n_tokens: usize,
    /// Of these, rows of prompts while somebody generates.
    pub(crate) beside: RowsBeside,
    /// Rows of logits of prompts that are scored.
    pub(crate) n_rows: usize,
}

/// Tokens that each slot reads in the next pass. Everybody who generates reads one. Of prompts the oldest gets half of the
/// room, so that long ones come to an end, and the others, shortest first, the rest.
pub(crate) fn plan(needs: &[Option<Need>], limits: PassLimits) -> Vec<usize> {
    let mut granted = vec![0; needs.len()];
    let mut prompts = Vec::new();
    let mut n_generating = 0;
    for (slot, need) in needs.iter().enumerate() {
        match need {
            Some(need) if need.generates => {
                granted[slot] = 1;
                n_generating += need.n_lanes;
            }
            Some(need) => prompts.push((slot, *need)),
            None => {}
        }
    }
    let mut room = Room {
        n_tokens: limits.n_tokens.saturating_sub(n_generating),
        n_rows: limits.n_rows,
    };
    if n_generating > 0 {
        let rows = |(_, need): &(usize, Need)| need.n_tokens * need.n_lanes;
        let left = prompts.iter().map(rows).sum();
        room.n_tokens = room.n_tokens.min(limits.beside.rows(left));
    }
    prompts.sort_by_key(|(_, need)| need.since);
    let Some(oldest) = prompts.first().copied() else {
        return granted;
    };
    room.grant(oldest, room.n_tokens.div_ceil(2), &mut granted);
    prompts.sort_by_key(|(_, need)| (need.n_tokens, need.since));
    for prompt in prompts {
        if prompt.0 != oldest.0 {
            room.grant(prompt, usize::MAX, &mut granted);
        }
    }
    room.grant(oldest, usize::MAX, &mut granted);
    granted
}

/// What is left of a pass.
struct Room {
    n_tokens: usize,
    n_rows: usize,
}

impl Room {
    fn grant(&mut self, (slot, need): (usize, Need), most: usize, granted: &mut [usize]) {
        let most = most.min(self.n_tokens) / need.n_lanes;
        let mut n = (need.n_tokens - granted[slot]).min(most);
        if need.scores {
            n = n.min(self.n_rows);
            self.n_rows -= n;
        }
        self.n_tokens -= n * need.n_lanes;
        granted[slot] += n;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: PassLimits = PassLimits {
        n_tokens: 64,
        beside: RowsBeside {
            least: 16,
            most: 16,
        },
        n_rows: 8,
    };

    fn prompt(n_tokens: usize, since: u64) -> Option<Need> {
        Some(Need {
            n_tokens,
            n_lanes: 1,
            generates: false,
            scores: false,
            since,
        })
    }

    fn generating() -> Option<Need> {
        Some(Need {
            n_tokens: 1,
            n_lanes: 1,
            generates: true,
            scores: false,
            since: 0,
        })
    }

    #[test]
    fn prompts_fill_a_pass_and_the_oldest_gets_half() {
        assert_eq!(plan(&[prompt(100, 3)], LIMITS), [64]);
        let needs = [prompt(100, 3), None, prompt(100, 1), prompt(5, 4)];
        assert_eq!(plan(&needs, LIMITS), [27, 0, 32, 5]);
        assert_eq!(plan(&[prompt(3, 1), prompt(4, 2)], LIMITS), [3, 4]);
        assert_eq!(plan(&[None, None], LIMITS), [0, 0]);
    }

    #[test]
    fn who_generates_comes_first_and_waits_for_little() {
        let needs = [generating(), prompt(100, 1), generating()];
        assert_eq!(plan(&needs, LIMITS), [1, 16, 1]);
        let full = PassLimits {
            n_tokens: 2,
            beside: RowsBeside::fixed(1),
            n_rows: 1,
        };
        assert_eq!(plan(&needs, full), [1, 0, 1]);
        let needs = [generating(), prompt(9, 1)];
        assert_eq!(plan(&needs, full), [1, 1]);
    }

    #[test]
    fn models_with_experts_read_more_of_a_prompt_at_a_time() {
        let rows = |model, n_tokens, left| RowsBeside::of(model, n_tokens).rows(left);
        assert_eq!(rows((0, 0), 512, 100), 8);
        assert_eq!(rows((8, 2), 512, 100), 32);
        assert_eq!(rows((16, 5), 512, 100), 32);
        // A quarter of a pass at most.
        assert_eq!(rows((256, 8), 512, 100), 128);
        assert_eq!(rows((8, 2), 32, 100), 8);
        assert_eq!(RowsBeside::fixed(1).rows(10_000), 2);
    }

    #[test]
    fn long_prompts_go_on_faster() {
        let beside = RowsBeside::of((0, 0), 512);
        assert_eq!(beside.rows(512), 8);
        assert_eq!(beside.rows(4096), 64);
        assert_eq!(beside.rows(100_000), 128);
        let limits = PassLimits {
            n_tokens: 512,
            beside,
            n_rows: 8,
        };
        let needs = [generating(), prompt(30, 2), prompt(2000, 1)];
        assert_eq!(plan(&needs, limits), [1, 16, 16]);
    }

    #[test]
    fn two_lanes_take_two_rows() {
        let double = |need: Option<Need>| need.map(|need| Need { n_lanes: 2, ..need });
        assert_eq!(plan(&[double(prompt(100, 3))], LIMITS), [32]);
        let needs = [double(generating()), prompt(100, 1), double(prompt(100, 2))];
        // Of 16 rows beside, half are the oldest's.
        assert_eq!(plan(&needs, LIMITS), [1, 8, 4]);
    }

    #[test]
    fn scored_prompts_take_as_many_rows_as_there_are() {
        let scored = |n, since| {
            prompt(n, since).map(|need| Need {
                scores: true,
                ..need
            })
        };
        let needs = [scored(100, 1), scored(3, 2), prompt(10, 3)];
        assert_eq!(plan(&needs, LIMITS), [8, 0, 10]);
        let needs = [scored(4, 1), scored(30, 2)];
        assert_eq!(plan(&needs, LIMITS), [4, 4]);
    }
}
