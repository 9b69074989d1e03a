//! Whichever of several rules would have hit more of late: what is worth keeping differs from model to model, and from
//! text to text. Routers trained to balance their load pick by topic, and counting uses wins; where picks last from token to
//! token, the last use says more.
//!
//! Source: the set dueling of DIP (Qureshi et al., ISCA 2007), with a whole shadow directory for each rule as in its
//! section 4: a cache of the same size without contents, which costs a few bytes per expert. Differences: hits fade by
//! tokens instead of saturating counters, and a rule is left only for one that is ahead by a margin.

use crate::cache::{Cache, Capacity};
use crate::expert::{ExpertId, Now};
use crate::policy::Policy;

/// Tokens after which a hit or miss counts half for the choice.
const MEMORY: f64 = 32.0;
/// What another rule must be ahead, as a share of the lookups: changing between two that are alike helps nobody.
const AHEAD: f64 = 0.005;

/// Keeps what the rule keeps that does best.
#[derive(Debug)]
pub struct Duel {
    rules: Vec<Shadow>,
    chosen: usize,
    token: u64,
    /// Lookups, fading.
    lookups: f64,
}

/// A rule, with the cache that it would have.
#[derive(Debug)]
struct Shadow {
    cache: Cache,
    /// Hits, fading.
    hits: f64,
}

impl Duel {
    /// Between `rules`, the first of which is followed until another is ahead, for a model of `n_layers` layers with
    /// `n_experts` experts each and a cache of `n_slots`. Slots are taken to be alike, whatever they hold.
    pub fn new(
        rules: impl IntoIterator<Item = Box<dyn Policy>>,
        (n_layers, n_experts): (usize, usize),
        n_slots: usize,
    ) -> Self {
        let capacity = Capacity {
            slot_bytes: 1,
            n_slots,
        };
        let shadow = |rule| Shadow {
            cache: Cache::new(vec![capacity], |_| 0, (n_layers, n_experts), rule),
            hits: 0.0,
        };
        Self {
            rules: rules.into_iter().map(shadow).collect(),
            chosen: 0,
            token: 0,
            lookups: 0.0,
        }
    }

    fn rule(&self) -> &dyn Policy {
        self.rules[self.chosen].cache.policy()
    }

    /// Lets what was counted fade, and chooses.
    fn turn(&mut self, token: u64) {
        let faded = (-(token.saturating_sub(self.token) as f64) / MEMORY).exp2();
        self.token = token;
        let best = (0..self.rules.len()).fold(self.chosen, |best, at| {
            let is_more = self.rules[at].hits > self.rules[best].hits;
            if is_more { at } else { best }
        });
        if self.rules[best].hits > self.rules[self.chosen].hits + AHEAD * self.lookups {
            self.chosen = best;
        }
        self.lookups *= faded;
        for rule in &mut self.rules {
            rule.hits *= faded;
        }
    }
}

impl Policy for Duel {
    fn used(&mut self, expert: ExpertId, n_tokens: u32, now: Now) {
        if now.token != self.token {
            self.turn(now.token);
        }
        self.lookups += 1.0;
        for rule in &mut self.rules {
            match rule.cache.lookup(expert, n_tokens, now) {
                Some(_) => rule.hits += 1.0,
                None => {
                    rule.cache.place(expert, now, &|_| false);
                }
            }
        }
    }

    fn worth(&self, expert: ExpertId, now: Now) -> f64 {
        self.rule().worth(expert, now)
    }

    fn worths(&self, experts: &[ExpertId], now: Now, worths: &mut [f64]) {
        self.rule().worths(experts, now, worths);
    }

    fn admits(&self, new: f64, least: f64) -> bool {
        self.rule().admits(new, least)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Likes high numbers, or low ones.
    #[derive(Debug)]
    struct Sign(f64);

    impl Policy for Sign {
        fn used(&mut self, _: ExpertId, _: u32, _: Now) {}

        fn worth(&self, expert: ExpertId, _: Now) -> f64 {
            self.0 * f64::from(expert.expert)
        }

        fn admits(&self, new: f64, least: f64) -> bool {
            new > least
        }
    }

    #[test]
    fn the_rule_that_would_have_hit_is_followed_and_left_again() {
        let rules = [1.0, -1.0].map(|sign| Box::new(Sign(sign)) as Box<dyn Policy>);
        let mut duel = Duel::new(rules, (1, 10), 2);
        let mut token = 0;
        let mut tokens = |duel: &mut Duel, experts: [u16; 3], n: u64| {
            for _ in 0..n {
                token += 1;
                let now = Now { token, layer: 0 };
                for expert in experts {
                    duel.used(ExpertId { layer: 0, expert }, 1, now);
                }
            }
            duel.chosen
        };
        // Every expert once, so that both shadows are full of what they like.
        for first in [0, 3, 6] {
            tokens(&mut duel, [first, first + 1, first + 2], 1);
        }
        assert_eq!(tokens(&mut duel, [0, 1, 5], 20), 1, "low ones come again");
        assert_eq!(tokens(&mut duel, [9, 8, 5], 3), 1, "not at once");
        assert_eq!(tokens(&mut duel, [9, 8, 5], 200), 0);
        let now = Now::default();
        let id = ExpertId {
            layer: 0,
            expert: 7,
        };
        assert_eq!(duel.worth(id, now), 7.0);
    }
}
