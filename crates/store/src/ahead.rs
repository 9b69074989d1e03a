//! Reading ahead: what a predictor expects of the layers to come, and whether acting on it is worth while.
//!
//! A read that nobody wants delays the next one that somebody does, so on a busy disk reading ahead loses however good
//! the guesses are. Passes with and without it are timed in turns, and the faster way is kept for a while. A guess is asked
//! for only while nothing that is wanted is being read.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use crate::error::{StoreError, by_name};
use crate::predictors::{EdgeMoe, Given, Popularity, Predictor, Previous, Score, Scoreboard};

/// Passes of up to so many tokens decode; larger ones read prompts.
pub(crate) const FEW: usize = 8;
/// The most experts that are read ahead of a layer while decoding.
const LIMIT: usize = 2;
/// A prompt whose picks cover this share of the experts in one layer will touch nearly all of the next.
const NEARLY_ALL: f64 = 0.9;
/// Passes of a turn with reading ahead, or without it; turns of a trial; and passes for which the outcome is kept.
const TURN: usize = 4;
const TURNS: usize = 8;
const KEPT: usize = 128;
/// What passes may take with reading ahead, beside without, for it to be kept up: less is noise.
const GAIN: f64 = 0.98;

/// Who says what a layer will want before its router does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AheadKind {
    /// Nobody: nothing is read ahead.
    Off,
    /// The layer's own router, asked with the input of the layer before.
    #[default]
    Gate,
    /// A router that has run before all layers: what it says is certain ([`crate::Store::foresee`]).
    Exact,
    /// [`EdgeMoe`].
    EdgeMoe,
    /// [`Popularity`].
    Popularity,
    /// [`Previous`].
    Previous,
}

impl AheadKind {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Off,
        Self::Gate,
        Self::Exact,
        Self::EdgeMoe,
        Self::Popularity,
        Self::Previous,
    ];

    /// The name that [`FromStr`] reads.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Gate => "gate",
            Self::Exact => "exact",
            Self::EdgeMoe => "edgemoe",
            Self::Popularity => "popularity",
            Self::Previous => "previous",
        }
    }

    fn predictor(self, n_layers: usize, n_experts: usize) -> Option<Box<dyn Predictor>> {
        Some(match self {
            Self::Off => return None,
            Self::Gate => Box::new(Given::new("gate", n_layers)),
            // A pass at a time, so that one that failed leaves nothing behind.
            Self::Exact => Box::new(Given::new("exact", n_layers)),
            Self::EdgeMoe => Box::new(EdgeMoe::new(n_layers, n_experts)),
            Self::Popularity => Box::new(Popularity::new(
                n_layers,
                n_experts,
                crate::policies::HALF_LIFE,
            )),
            Self::Previous => Box::new(Previous::new(n_layers)),
        })
    }
}

impl fmt::Display for AheadKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for AheadKind {
    type Err = StoreError;

    fn from_str(name: &str) -> Result<Self, StoreError> {
        by_name("way of reading ahead", &Self::ALL, Self::name, name)
    }
}

/// What a pass should find out about the next layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// Nothing.
    Nowhere,
    /// Nothing: all of its experts will be wanted.
    Everywhere,
    /// What its router says to this layer's input.
    Gate,
}

/// The predictor of a store, with what is known of its use.
#[derive(Debug)]
pub(crate) struct Ahead {
    kind: AheadKind,
    n_layers: usize,
    /// Experts of every layer.
    n_experts_of: Vec<u16>,
    predictor: Option<Box<dyn Predictor>>,
    /// `None`: always, without a trial.
    trial: Option<Trial>,
    /// Whether picks are told before a pass, so that no layer's router need be asked early.
    foreseen: bool,
    scoreboard: Option<Scoreboard>,
    ranked: Vec<u16>,
}

impl Ahead {
    /// For layers with so many experts, none with more than `n_experts`. `adaptive`: only while it helps. `scored`: all ways
    /// of guessing are scored, whichever is acted on; of the router's own word, that which there is: `foreseen`, or asked
    /// a layer early.
    pub(crate) fn new(
        kind: AheadKind,
        (n_experts_of, n_experts): (&[u16], usize),
        (adaptive, scored): (bool, bool),
        foreseen: bool,
    ) -> Self {
        let n_layers = n_experts_of.len();
        let absent = match foreseen {
            true => AheadKind::Gate,
            false => AheadKind::Exact,
        };
        let all = AheadKind::ALL.iter().filter(|kind| **kind != absent);
        let predictors = all
            .filter_map(|kind| kind.predictor(n_layers, n_experts))
            .collect();
        Self {
            kind,
            n_layers,
            n_experts_of: n_experts_of.to_vec(),
            predictor: kind.predictor(n_layers, n_experts),
            trial: (adaptive && kind != AheadKind::Exact).then(Trial::default),
            foreseen,
            scoreboard: scored.then(|| Scoreboard::new(n_layers, predictors)),
            ranked: Vec::with_capacity(n_experts),
        }
    }

    /// A pass through all layers begins.
    pub(crate) fn begin(&mut self, n_tokens: usize) {
        if let Some(trial) = &mut self.trial {
            trial.begin(Instant::now(), n_tokens <= FEW);
        }
    }

    /// Whether what is told before a pass is acted on.
    pub(crate) fn is_exact(&self) -> bool {
        self.kind == AheadKind::Exact
    }

    /// Takes what `layer` will pick in the pass that begins.
    pub(crate) fn foresee(&mut self, layer: u16, experts: &[u16]) {
        if let Some(scoreboard) = &mut self.scoreboard {
            scoreboard.give(layer, experts);
        }
    }

    fn acts(&self, n_tokens: usize) -> bool {
        let helps = self.trial.as_ref().is_none_or(|trial| trial.is_on);
        self.kind != AheadKind::Off && (n_tokens > FEW || helps)
    }

    /// The layer after `layer`, and how many experts it has.
    pub(crate) fn next(&self, layer: u16) -> (u16, u16) {
        let next = (usize::from(layer) + 1) % self.n_layers.max(1);
        (next as u16, self.n_experts_of[next])
    }

    /// What to find out for a pass of `n_tokens` whose picks in `layer` are `n_picked` experts.
    pub(crate) fn look(&self, layer: u16, n_tokens: usize, n_picked: usize) -> Look {
        let is_decoding = n_tokens <= FEW;
        if self.is_exact() {
            return Look::Nowhere;
        }
        if !is_decoding
            && self.acts(n_tokens)
            && n_picked as f64 >= NEARLY_ALL * f64::from(self.n_experts_of[usize::from(layer)])
        {
            return Look::Everywhere;
        }
        let is_asked = self.kind == AheadKind::Gate && self.acts(n_tokens);
        let is_scored = is_decoding && self.scoreboard.is_some() && !self.foreseen;
        match is_asked || is_scored {
            true => Look::Gate,
            false => Look::Nowhere,
        }
    }

    /// Tells the predictors what `layer` picked, and gives what is expected of the next one, best first.
    pub(crate) fn observe(
        &mut self,
        layer: u16,
        picked: &[u16],
        n_tokens: usize,
    ) -> Option<(u16, &[u16])> {
        // No tokens are those of a cache that is being filled.
        if n_tokens > FEW || n_tokens == 0 {
            return None;
        }
        if let Some(scoreboard) = &mut self.scoreboard {
            scoreboard.observe(layer, picked);
        }
        let next = (layer + 1) % self.n_layers.max(1) as u16;
        let acts = self.acts(n_tokens);
        let predictor = self.predictor.as_mut()?;
        predictor.observe(layer, picked);
        if matches!(self.kind, AheadKind::Gate | AheadKind::Exact) || !acts {
            return None;
        }
        predictor.rank(next, &mut self.ranked);
        self.ranked.truncate(LIMIT);
        Some((next, &self.ranked))
    }

    /// Takes what a layer's router said early; how many of these to read, if they are to be read.
    pub(crate) fn give(&mut self, layer: u16, ranked: &[u16], n_tokens: usize) -> usize {
        if n_tokens <= FEW
            && let Some(scoreboard) = &mut self.scoreboard
        {
            scoreboard.give(layer, ranked);
        }
        match (
            self.kind == AheadKind::Gate && self.acts(n_tokens),
            n_tokens <= FEW,
        ) {
            (false, _) => 0,
            (true, true) => LIMIT,
            (true, false) => usize::MAX,
        }
    }

    pub(crate) fn scores(&self) -> &[Score] {
        self.scoreboard.as_ref().map_or(&[], Scoreboard::scores)
    }
}

/// Times passes with and without reading ahead, in turns so short that a cache which is still being filled, or a text that
/// changes, is the same to both.
#[derive(Debug, Default)]
struct Trial {
    is_on: bool,
    /// Passes of this trial.
    n_passes: usize,
    /// What passes took without and with it.
    times: [Vec<Duration>; 2],
    /// The outcome is kept for this many passes more.
    kept: usize,
    last: Option<Instant>,
}

impl Trial {
    /// A pass begins at `now`; only those that decode, one after the other, are timed.
    fn begin(&mut self, now: Instant, is_decoding: bool) {
        let last = self.last.take();
        if !is_decoding {
            return;
        }
        self.last = Some(now);
        let Some(last) = last else { return };
        if self.kept > 0 {
            self.kept -= 1;
            return;
        }
        // The first pass of a turn may find what the other way has read, or wait for it.
        if !self.n_passes.is_multiple_of(TURN) {
            self.times[usize::from(self.is_on)].push(now - last);
        }
        self.n_passes += 1;
        let turn = self.n_passes / TURN;
        self.is_on = match turn {
            // Without, with, with, without: what changes steadily is the same to both.
            0..TURNS => matches!(turn % 4, 1 | 2),
            _ => {
                let [without, with] = self.times.each_mut().map(|times| typical(times));
                self.times.iter_mut().for_each(Vec::clear);
                (self.n_passes, self.kept) = (0, KEPT);
                with.as_secs_f64() < GAIN * without.as_secs_f64()
            }
        };
    }
}

/// The mean of the shorter three quarters: a pass may have waited for somebody who typed.
fn typical(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    let n = (times.len() * 3).div_ceil(4).max(1);
    times.iter().take(n).sum::<Duration>() / n as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs passes that take `with` or `without`, and says in which share of the last 300 of them reading ahead was on.
    fn share_on(with: u64, without: u64) -> f64 {
        let (mut trial, mut now, mut n_on) = (Trial::default(), Instant::now(), 0);
        for pass in 0..900 {
            trial.begin(now, true);
            n_on += usize::from(trial.is_on && pass >= 600);
            now += Duration::from_millis(if trial.is_on { with } else { without });
        }
        n_on as f64 / 300.0
    }

    #[test]
    fn the_faster_way_is_kept() {
        assert!(share_on(10, 20) > 0.8, "{}", share_on(10, 20));
        assert!(share_on(20, 10) < 0.2, "{}", share_on(20, 10));
    }

    #[test]
    fn a_cache_that_is_being_filled_decides_nothing() {
        let (mut trial, mut now) = (Trial::default(), Instant::now());
        for pass in 0..=(TURN * TURNS) as u64 {
            trial.begin(now, true);
            // Every pass is faster than the one before it, and one without reading ahead faster than one with it.
            let gain = if trial.is_on { 0 } else { 5 };
            now += Duration::from_millis(100 - 2 * pass - gain);
        }
        assert!(trial.kept > 0 && !trial.is_on);
    }

    #[test]
    fn prompts_are_not_timed_and_read_ahead_at_once() {
        let mut ahead = Ahead::new(AheadKind::Gate, (&[10, 4, 10], 10), (true, false), false);
        for _ in 0..100 {
            ahead.begin(64);
        }
        assert_eq!(ahead.look(0, 64, 10), Look::Everywhere);
        assert_eq!(ahead.look(0, 64, 4), Look::Gate);
        assert_eq!(ahead.look(1, 64, 4), Look::Everywhere, "a layer of four");
        assert_eq!(ahead.give(1, &[1, 2], 64), usize::MAX);
        assert_eq!(
            (ahead.look(0, 1, 2), ahead.give(1, &[1, 2], 1)),
            (Look::Nowhere, 0),
            "on trial"
        );
    }

    #[test]
    fn each_kind_expects_the_next_layer() {
        for kind in AheadKind::ALL {
            assert_eq!(kind.name().parse::<AheadKind>().unwrap(), kind);
            let foreseen = kind == AheadKind::Exact;
            let mut ahead = Ahead::new(kind, (&[8, 8], 8), (false, true), foreseen);
            let mut expected = Vec::new();
            for _ in 0..6 {
                for layer in 0..2 {
                    let next = ahead.observe(layer, &[layer + 1, layer + 3, layer + 5], 1);
                    expected = next
                        .map(|(layer, ranked)| (layer, ranked.to_vec()))
                        .into_iter()
                        .collect();
                    let look = match foreseen {
                        true => Look::Nowhere,
                        false => Look::Gate,
                    };
                    assert_eq!(ahead.look(layer, 1, 3), look, "{kind} is scored");
                    let n = ahead.give(1 - layer, &[1, 2, 3], 1);
                    assert_eq!(n, if kind == AheadKind::Gate { LIMIT } else { 0 });
                }
            }
            match kind {
                AheadKind::Off | AheadKind::Gate | AheadKind::Exact => assert!(expected.is_empty()),
                _ => {
                    assert_eq!((expected[0].0, expected[0].1.len()), (0, LIMIT), "{kind}");
                    assert!(
                        expected[0]
                            .1
                            .iter()
                            .all(|expert| [1, 3, 5].contains(expert)),
                        "{kind}"
                    );
                }
            }
            assert!(ahead.scores().len() >= 4);
        }
        assert!("oracle".parse::<AheadKind>().is_err());
    }

    #[test]
    fn what_was_foreseen_is_right_and_needs_no_trial() {
        let mut ahead = Ahead::new(AheadKind::Exact, (&[8, 8], 8), (true, true), true);
        for pass in 0..4_u16 {
            // A pass that was told of and never came leaves nothing behind.
            for _ in 0..2 {
                (0..2).for_each(|layer| ahead.foresee(layer, &[pass, pass + layer + 1]));
            }
            ahead.begin(1);
            assert!(ahead.acts(1) && ahead.is_exact());
            for layer in 0..2 {
                assert!(ahead.observe(layer, &[pass, pass + layer + 1], 1).is_none());
            }
        }
        let names: Vec<&str> = ahead.scores().iter().map(|score| score.name).collect();
        assert_eq!(
            names,
            ["exact", "edgemoe", "popularity", "previous", "control"]
        );
        assert_eq!(ahead.scores()[0].overall().whole_sets(), 1.0);
    }
}
