//! The tests of a run: every combination of the lengths that were asked for, as llama-bench makes them.

use std::fmt;

/// The values that were asked for; a length of 0 leaves its test out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lists<'a> {
    /// Tokens of a prompt.
    pub(crate) prompts: &'a [usize],
    /// Tokens that are generated.
    pub(crate) generated: &'a [usize],
    /// Tokens before, which are not measured.
    pub(crate) depths: &'a [usize],
    /// Sequences that are decoded together; prompts are read one at a time.
    pub(crate) seqs: &'a [usize],
}

/// One test: a prompt is read, or tokens are generated one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Test {
    pub(crate) n_prompt: usize,
    pub(crate) n_gen: usize,
    pub(crate) n_depth: usize,
    pub(crate) n_seqs: usize,
}

impl Lists<'_> {
    /// By depth, prompts first.
    pub(crate) fn tests(&self) -> Vec<Test> {
        let mut tests = Vec::new();
        for &n_depth in self.depths {
            let prompts = self.prompts.iter().filter(|n| **n > 0);
            tests.extend(prompts.map(|&n_prompt| Test {
                n_prompt,
                n_gen: 0,
                n_depth,
                n_seqs: 1,
            }));
            for &n_gen in self.generated.iter().filter(|n| **n > 0) {
                let seqs = self.seqs.iter().filter(|n| **n > 0);
                tests.extend(seqs.map(|&n_seqs| Test {
                    n_prompt: 0,
                    n_gen,
                    n_depth,
                    n_seqs,
                }));
            }
        }
        tests
    }
}

impl Test {
    /// Tokens that are counted, of all sequences.
    pub(crate) fn n_tokens(&self) -> usize {
        (self.n_prompt + self.n_gen) * self.n_seqs
    }

    /// Tokens that one sequence holds at the end.
    pub(crate) fn n_ctx(&self) -> usize {
        self.n_depth
            .saturating_add(self.n_prompt)
            .saturating_add(self.n_gen)
    }
}

impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.n_prompt > 0 {
            write!(f, "pp{}", self.n_prompt)?;
        } else {
            write!(f, "tg{}", self.n_gen)?;
        }
        if self.n_seqs > 1 {
            write!(f, " x {}", self.n_seqs)?;
        }
        if self.n_depth > 0 {
            write!(f, " @ d{}", self.n_depth)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_is_a_test() {
        let lists = Lists {
            prompts: &[256, 512],
            generated: &[64],
            depths: &[0, 1024],
            seqs: &[1, 8],
        };
        let names: Vec<_> = lists.tests().iter().map(Test::to_string).collect();
        assert_eq!(
            names[..4],
            ["pp256", "pp512", "tg64", "tg64 x 8"].map(str::to_owned)
        );
        assert_eq!(
            (names.len(), &*names[7], names[4].as_str()),
            (8, "tg64 x 8 @ d1024", "pp256 @ d1024")
        );
        let last = lists.tests()[7];
        assert_eq!((last.n_tokens(), last.n_ctx()), (512, 1088));
    }

    #[test]
    fn zero_leaves_a_test_out() {
        let lists = Lists {
            prompts: &[0],
            generated: &[128],
            depths: &[0],
            seqs: &[1],
        };
        assert_eq!(lists.tests().len(), 1);
        assert_eq!(lists.tests()[0].to_string(), "tg128");
    }
}
