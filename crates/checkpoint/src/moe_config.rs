//! The experts of a model: how many each layer has, how they are picked, and what runs beside them.

use crate::decoupled_router::DecoupledRouter;

/// Experts of all layers together; far above any model, so that a damaged file cannot make
/// readers reserve memory without end.
const MAX_EXPERTS: usize = 1 << 22;

/// The experts of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct MoeConfig {
    /// Layers with experts, ascending; empty for dense models.
    pub layers: Vec<usize>,
    /// Experts per MoE layer; the most of any where layers differ. Null experts are not counted.
    pub n_experts: usize,
    /// Experts of each of `layers` where layers differ, empty where all have `n_experts`. See
    /// [`crate::ModelConfig::n_experts_in`].
    pub uneven: Vec<usize>,
    /// For each of `layers` and each of its experts the one whose weights it has, counted among those that are stored;
    /// empty where every expert has its own. See [`crate::ModelConfig::n_stored_in`].
    pub shared_weights: Vec<Vec<u16>>,
    /// How the matrices of experts are stored, where they are not stored whole.
    pub factors: Option<Factors>,
    /// Null experts of each layer, behind the others: the router scores them, and they add nothing.
    pub n_null: usize,
    /// The most experts that one token is sent to, null ones counted.
    pub top_k: usize,
    /// Width of one expert.
    pub intermediate_size: usize,
    /// From router logits to experts and weights.
    pub router: RouterConfig,
    /// Bias of the router's logits.
    pub router_bias: bool,
    /// Biases in the experts' products.
    pub expert_bias: bool,
    /// An expert that every token uses.
    pub shared: Option<SharedExpert>,
    /// A feed-forward beside the experts.
    pub residual: Option<ResidualMlp>,
    /// Width of the state that routers hand from layer to layer, for each token by itself.
    pub recurrent_router: Option<usize>,
    /// The network that makes the logits of all layers before the first of them runs.
    pub decoupled_router: Option<DecoupledRouter>,
}

impl Default for MoeConfig {
    /// No experts.
    fn default() -> Self {
        Self {
            layers: Vec::new(),
            n_experts: 0,
            uneven: Vec::new(),
            shared_weights: Vec::new(),
            factors: None,
            n_null: 0,
            top_k: 0,
            intermediate_size: 0,
            router: RouterConfig::TopK { norm: true },
            router_bias: false,
            expert_bias: false,
            shared: None,
            residual: None,
            recurrent_router: None,
            decoupled_router: None,
        }
    }
}

/// The expert that every token uses. Several shared experts are stored as one of their total width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedExpert {
    /// Total width.
    pub intermediate_size: usize,
    /// Whether its output is multiplied by the sigmoid of a learned projection.
    pub gated: bool,
}

/// Every matrix of an expert, `[out, in]`, as `outer [out, rank] x inner [rank, in]` plus a few rows: MC-SMoE (arXiv
/// 2310.01334). The rows are stored behind those of `inner`, and which rows they are beside them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Factors {
    /// Width of the products.
    pub rank: usize,
    /// Rows of gate and up matrices, the most where they differ.
    pub up_rows: usize,
    /// Rows of down matrices, the most where they differ.
    pub down_rows: usize,
    /// Where matrices differ: for each layer with experts, and each stored expert, the rows of its gate, up and down
    /// matrices; empty where all have the same.
    pub uneven: Vec<Vec<[usize; 3]>>,
}

impl Factors {
    /// The parts of an expert, in the order of [`Self::rows_of`].
    pub const PARTS: [&'static str; 3] = ["gate_proj", "up_proj", "down_proj"];

    /// The same numbers of rows in all experts.
    #[must_use]
    pub fn even(rank: usize, up_rows: usize, down_rows: usize) -> Self {
        Self {
            rank,
            up_rows,
            down_rows,
            uneven: Vec::new(),
        }
    }

    /// For each layer with experts, and each stored expert, the rows of its gate, up and down matrices.
    #[must_use]
    pub fn uneven(rank: usize, rows: Vec<Vec<[usize; 3]>>) -> Self {
        let most = |of: fn(&[usize; 3]) -> usize| rows.iter().flatten().map(of).max().unwrap_or(0);
        Self {
            rank,
            up_rows: most(|rows| rows[0].max(rows[1])),
            down_rows: most(|rows| rows[2]),
            uneven: rows,
        }
    }

    /// The most rows of any matrix of this part, `gate_proj`, `up_proj` or `down_proj`.
    #[must_use]
    pub fn most_rows(&self, part: &str) -> usize {
        match part {
            "down_proj" => self.down_rows,
            _ => self.up_rows,
        }
    }

    /// Rows of the gate, up and down matrices of stored expert `expert` of the `at`-th layer with experts.
    #[must_use]
    pub fn rows_of(&self, at: usize, expert: usize) -> [usize; 3] {
        let own = self.uneven.get(at).and_then(|layer| layer.get(expert));
        let same = [self.up_rows, self.up_rows, self.down_rows];
        own.copied().unwrap_or(same)
    }
}

/// The feed-forward beside the experts of PR-MoE (DeepSpeed-MoE, arXiv 2201.05596).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResidualMlp {
    /// Its width.
    pub intermediate_size: usize,
    /// Whether the two parts are weighted by the softmax of a learned projection to two values, the experts' first. They
    /// are otherwise added.
    pub learned: bool,
}

/// The rule from router logits to experts and weights. At inference nothing is noisy: what training draws at random is
/// left out, except in [`RouterConfig::Uniform`], whose draws are a function of the position.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RouterConfig {
    /// Softmax over all experts, the `top_k` best, divided by their sum if `norm`. A softmax over the picked logits alone
    /// is the same as `norm`.
    TopK {
        /// Whether the weights are divided by their sum.
        norm: bool,
    },
    /// Softmax over all experts, the best one, weighted by its probability (Switch Transformer).
    Switch,
    /// Softmax over all experts, the two best, divided by their sum (GShard).
    Top2,
    /// The best experts that together have more than `mass` of the softmax, weighted by their probabilities.
    TopP {
        /// Probability to collect.
        mass: f64,
    },
    /// The `top_k` best of real and null experts by softmax; the weights of the real ones are divided by their sum (AdaMoE).
    NullExperts,
    /// EvoMoE's gate: softmax of the logits over a temperature; weights are its values.
    DenseToSparse {
        /// Divides the logits.
        temperature: f64,
        /// Experts above this value are picked, and the best one in any case.
        threshold: f64,
        /// Only the best expert is picked.
        hard: bool,
    },
    /// `top_k` experts at random, each of weight `1 / top_k` (THOR's inference); there is no router to ask.
    Uniform {
        /// What the draws follow from, with layer and position.
        seed: u64,
    },
    /// The `top_k` best experts are summed, not averaged: each has the weight `M / (M + eps)`, where `M` is what they have
    /// of the softmax together (Union of Experts).
    Union {
        /// Added to `M`.
        eps: f64,
    },
    /// DeepSeek's: the best experts of the best groups.
    GroupLimited {
        /// How logits become scores.
        score: Score,
        /// Groups of consecutive experts.
        n_groups: usize,
        /// Groups that stay in the race.
        keep_groups: usize,
        /// A group's score is the sum of its two best experts (V3), not its best (V2).
        sum_of_best_two: bool,
        /// Whether the weights are divided by their sum.
        norm: bool,
        /// Factor on the weights.
        scale: f64,
        /// Whether a stored bias moves the selection (`e_score_correction_bias`).
        correction_bias: bool,
    },
    /// PhiMoE's two thresholded softmaxes, in the inference form of transformers.
    SparseMixer {
        /// Half the relative width of the threshold, `router_jitter_noise`.
        eps: f64,
    },
}

/// How router logits become scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Score {
    /// Softmax over all experts.
    Softmax,
    /// Sigmoid of each logit.
    Sigmoid,
}

impl RouterConfig {
    /// The name of the rule: that of the policy in crate `routing`, and of the router in recipes.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::TopK { .. } => "top_k",
            Self::Switch => "switch",
            Self::Top2 => "top_2",
            Self::TopP { .. } => "top_p",
            Self::NullExperts => "null_experts",
            Self::DenseToSparse { .. } => "dense_to_sparse",
            Self::Uniform { .. } => "uniform",
            Self::Union { .. } => "union",
            Self::GroupLimited { .. } => "group_limited",
            Self::SparseMixer { .. } => "sparse_mixer",
        }
    }

    /// Whether tokens get different numbers of (real) experts.
    #[must_use]
    pub fn is_ragged(&self) -> bool {
        matches!(
            self,
            Self::TopP { .. } | Self::NullExperts | Self::DenseToSparse { hard: false, .. }
        )
    }

    /// Whether a token may be sent to all experts, so that there is no number of picks to choose.
    #[must_use]
    pub fn may_pick_all(&self) -> bool {
        matches!(
            self,
            Self::TopP { .. } | Self::DenseToSparse { hard: false, .. }
        )
    }

    /// Whether something stored moves the choice of experts, and not their weights (`e_score_correction_bias`).
    #[must_use]
    pub fn has_correction(&self) -> bool {
        matches!(
            self,
            Self::GroupLimited {
                correction_bias: true,
                ..
            }
        )
    }
}

impl MoeConfig {
    /// Whether the weights of a token's experts are divided by their sum.
    #[must_use]
    pub fn norm_topk_prob(&self) -> bool {
        match self.router {
            RouterConfig::TopK { norm } | RouterConfig::GroupLimited { norm, .. } => norm,
            RouterConfig::Top2 | RouterConfig::NullExperts | RouterConfig::Uniform { .. } => true,
            _ => false,
        }
    }

    /// Experts of `layers[at]`, null ones not counted.
    #[must_use]
    pub fn n_experts_at(&self, at: usize) -> usize {
        self.uneven.get(at).copied().unwrap_or(self.n_experts)
    }

    /// Experts of `layers[at]` whose weights are stored; fewer than there are where some share them.
    #[must_use]
    pub fn n_stored_at(&self, at: usize) -> usize {
        let map = self.shared_weights.get(at);
        map.map_or_else(|| self.n_experts_at(at), |map| n_stored(map))
    }

    /// Experts of each of `layers`, null ones not counted.
    pub fn counts(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.layers.len()).map(|at| self.n_experts_at(at))
    }

    /// Experts of all layers together.
    #[must_use]
    pub fn n_experts_in_all(&self) -> usize {
        self.counts().sum()
    }

    /// Sets the experts of each of `layers`, in `uneven` only where they differ.
    pub fn set_counts(&mut self, counts: Vec<usize>) {
        self.n_experts = counts.iter().copied().max().unwrap_or(0);
        let same = counts.iter().all(|count| *count == self.n_experts);
        self.uneven = if same { Vec::new() } else { counts };
    }

    /// Whether picks follow from logits; random ones do not.
    #[must_use]
    pub fn looks_at_logits(&self) -> bool {
        !matches!(self.router, RouterConfig::Uniform { .. })
    }

    /// Whether layers have a matrix that makes router logits. Random picks need none, and a decoupled router makes them all.
    #[must_use]
    pub fn has_gate(&self) -> bool {
        self.looks_at_logits() && self.decoupled_router.is_none()
    }

    /// Length of a row of router logits in the layer that has most.
    #[must_use]
    pub fn n_logits(&self) -> usize {
        self.n_experts.saturating_add(self.n_null)
    }

    /// What only `cadre_moe` can say, in words; empty for a model of one of the published architectures' kind.
    #[must_use]
    pub fn only_ours(&self) -> Vec<String> {
        let mut list = Vec::new();
        let mut say = |is_so: bool, text: String| {
            if is_so {
                list.push(text);
            }
        };
        let counts: Vec<usize> = self.counts().collect();
        say(
            !self.uneven.is_empty(),
            format!("different numbers of experts per layer ({counts:?})"),
        );
        say(self.factors.is_some(), "experts in factors".to_owned());
        say(
            !self.shared_weights.is_empty(),
            "experts that share weights".to_owned(),
        );
        say(
            self.n_null > 0,
            format!("null experts ({} per layer)", self.n_null),
        );
        let name = self.router.name();
        let is_ours = matches!(
            self.router,
            RouterConfig::TopP { .. }
                | RouterConfig::NullExperts
                | RouterConfig::DenseToSparse { .. }
                | RouterConfig::Uniform { .. }
                | RouterConfig::Union { .. }
        );
        say(is_ours, format!("picks by the rule `{name}`"));
        let residual = self.residual.map_or("", |residual| match residual.learned {
            true => "a feed-forward beside the experts, mixed by learned coefficients",
            false => "a feed-forward beside the experts, added",
        });
        say(!residual.is_empty(), residual.to_owned());
        let recurrent = "a router that hands a state from layer to layer";
        say(self.recurrent_router.is_some(), recurrent.to_owned());
        let decoupled = "a router that runs before the model";
        say(self.decoupled_router.is_some(), decoupled.to_owned());
        list
    }

    /// Checks the relations between the fields, for a model of `n_layers`. The error is a key and what is wrong with it.
    pub(crate) fn check(&self, n_layers: usize) -> Result<(), (&'static str, String)> {
        if n_layers.saturating_mul(self.n_logits().max(1)) > MAX_EXPERTS {
            let problem = format!(
                "is {n_layers}, which with num_experts = {} makes more than {MAX_EXPERTS} experts",
                self.n_logits()
            );
            return Err(("num_hidden_layers", problem));
        }
        if self.n_logits() > usize::from(u16::MAX) {
            let problem = format!("is {}, expected at most {}", self.n_logits(), u16::MAX);
            return Err(("num_experts", problem));
        }
        let known = self.layers.last().is_none_or(|last| *last < n_layers);
        let ascends = self.layers.windows(2).all(|pair| pair[0] < pair[1]);
        if !known || !ascends {
            let problem = format!(
                "{:?} are not ascending layers below {n_layers}",
                self.layers
            );
            return Err(("(layers with experts)", problem));
        }
        self.check_counts()?;
        self.check_shared()?;
        self.check_factors()?;
        if let Some(router) = &self.decoupled_router {
            router.check(self)?;
        }
        self.check_groups()
    }

    fn check_counts(&self) -> Result<(), (&'static str, String)> {
        if !self.uneven.is_empty() && self.uneven.len() != self.layers.len() {
            let problem = format!(
                "gives {} numbers for {} layers with experts",
                self.uneven.len(),
                self.layers.len()
            );
            return Err(("num_experts", problem));
        }
        let fewest = self.counts().min().unwrap_or(self.n_experts);
        if fewest == 0 && !self.layers.is_empty() {
            let problem = "is 0 in a layer with experts, expected at least 1".to_owned();
            return Err(("num_experts", problem));
        }
        // Of rules that may pick all, `top_k` is what the largest layer has.
        if !self.router.may_pick_all() && self.top_k > fewest + self.n_null {
            let of = match (self.uneven.is_empty(), self.n_null) {
                (true, 0) => format!("num_experts = {fewest}"),
                (false, 0) => format!("the {fewest} experts of the smallest layer"),
                (_, n_null) => format!("{fewest} experts and {n_null} null experts"),
            };
            let problem = format!("is {}, more than {of}", self.top_k);
            return Err(("num_experts_per_tok", problem));
        }
        Ok(())
    }

    fn check_factors(&self) -> Result<(), (&'static str, String)> {
        let Some(factors) = &self.factors else {
            return Ok(());
        };
        let key = "(factors of experts)";
        let lists = &factors.uneven;
        if !lists.is_empty() && lists.len() != self.layers.len() {
            let problem = format!(
                "have {} lists for {} layers",
                lists.len(),
                self.layers.len()
            );
            return Err((key, problem));
        }
        for (at, (list, layer)) in lists.iter().zip(&self.layers).enumerate() {
            let n_stored = self.n_stored_at(at);
            if list.len() != n_stored {
                let problem = format!(
                    "give rows of {} experts for layer {layer}, which has {n_stored}",
                    list.len()
                );
                return Err((key, problem));
            }
        }
        if factors.rank == 0 || factors.rank > self.intermediate_size {
            let problem = format!(
                "have rank {}, expected 1 to {}",
                factors.rank, self.intermediate_size
            );
            return Err((key, problem));
        }
        if factors.up_rows > self.intermediate_size {
            let problem = format!(
                "have {} rows of {}",
                factors.up_rows, self.intermediate_size
            );
            return Err((key, problem));
        }
        match self.expert_bias {
            true => Err((key, "go with no biases of experts".to_owned())),
            false => Ok(()),
        }
    }

    fn check_shared(&self) -> Result<(), (&'static str, String)> {
        let key = "(experts that share weights)";
        let maps = &self.shared_weights;
        if !maps.is_empty() && maps.len() != self.layers.len() {
            let problem = format!("has {} lists for {} layers", maps.len(), self.layers.len());
            return Err((key, problem));
        }
        for ((map, layer), n) in maps.iter().zip(&self.layers).zip(self.counts()) {
            let n_stored = n_stored(map);
            let mut used = vec![false; n_stored];
            map.iter().for_each(|id| used[usize::from(*id)] = true);
            if map.len() != n || n_stored > n || !used.iter().all(|used| *used) {
                let problem = format!(
                    "is {map:?} for layer {layer}, expected for each of its {n} experts a number from 0, none left out"
                );
                return Err((key, problem));
            }
        }
        Ok(())
    }

    fn check_groups(&self) -> Result<(), (&'static str, String)> {
        let RouterConfig::GroupLimited {
            n_groups,
            keep_groups,
            ..
        } = self.router
        else {
            return Ok(());
        };
        for n_experts in self.counts() {
            if n_groups == 0 || !n_experts.is_multiple_of(n_groups) {
                let problem = format!("is {n_groups}, which does not divide {n_experts} experts");
                return Err(("n_group", problem));
            }
            if !(1..=n_groups).contains(&keep_groups)
                || keep_groups * (n_experts / n_groups) < self.top_k
            {
                let problem = format!(
                    "is {keep_groups} of {n_groups} groups, which cannot give {} of {n_experts} experts",
                    self.top_k
                );
                return Err(("topk_group", problem));
            }
        }
        Ok(())
    }
}

/// Experts whose weights are stored, by the list of who has whose.
fn n_stored(map: &[u16]) -> usize {
    map.iter().max().map_or(0, |most| usize::from(*most) + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uneven() -> MoeConfig {
        let mut moe = MoeConfig {
            layers: vec![0, 2, 3],
            top_k: 2,
            intermediate_size: 8,
            ..MoeConfig::default()
        };
        moe.set_counts(vec![4, 4, 8]);
        moe
    }

    #[test]
    fn counts_are_kept_apart_only_where_they_differ() {
        let mut moe = uneven();
        assert_eq!((moe.n_experts, moe.n_experts_in_all()), (8, 16));
        assert_eq!(moe.counts().collect::<Vec<_>>(), [4, 4, 8]);
        moe.set_counts(vec![6, 6, 6]);
        assert!(moe.uneven.is_empty());
        assert_eq!((moe.n_experts_at(2), moe.n_experts_in_all()), (6, 18));
    }

    #[test]
    fn contradictions_are_named() {
        let said = |moe: &MoeConfig| moe.check(4).unwrap_err();
        let mut moe = uneven();
        assert!(moe.check(4).is_ok());
        assert_eq!(
            said(&MoeConfig {
                top_k: 5,
                ..moe.clone()
            })
            .0,
            "num_experts_per_tok"
        );
        let null = MoeConfig {
            top_k: 5,
            n_null: 1,
            router: RouterConfig::NullExperts,
            ..moe.clone()
        };
        assert!(null.check(4).is_ok());
        let all = MoeConfig {
            top_k: 8,
            router: RouterConfig::TopP { mass: 0.4 },
            ..moe.clone()
        };
        assert!(all.check(4).is_ok());
        assert!(moe.check(3).is_err(), "layer 3 of 3");
        moe.uneven.pop();
        assert!(said(&moe).1.contains("2 numbers for 3"));
        moe.uneven = vec![4, 0, 8];
        assert!(said(&moe).1.contains("at least 1"));
        moe.uneven = Vec::new();
        moe.layers = vec![2, 2];
        assert!(said(&moe).1.contains("ascending"));
    }

    #[test]
    fn shared_weights_leave_none_out() {
        let mut moe = uneven();
        moe.shared_weights = vec![vec![0, 1, 0, 1], vec![0; 4], vec![3, 2, 1, 0, 0, 1, 2, 3]];
        assert!(moe.check(4).is_ok());
        let stored: Vec<usize> = (0..3).map(|at| moe.n_stored_at(at)).collect();
        assert_eq!(stored, [2, 1, 4]);
        for bad in [vec![0, 2, 0, 2], vec![0, 1, 0], vec![0, 1, 2, 9]] {
            moe.shared_weights[0] = bad;
            assert!(moe.check(4).unwrap_err().1.contains("for layer 0"));
        }
        moe.shared_weights.pop();
        assert!(moe.check(4).unwrap_err().1.contains("2 lists for 3"));
    }

    #[test]
    fn groups_must_divide_every_layer() {
        let mut moe = uneven();
        moe.router = RouterConfig::GroupLimited {
            score: Score::Sigmoid,
            n_groups: 4,
            keep_groups: 2,
            sum_of_best_two: true,
            norm: true,
            scale: 1.0,
            correction_bias: true,
        };
        assert!(moe.check(4).is_ok());
        moe.uneven[1] = 6;
        assert!(moe.check(4).unwrap_err().1.contains("6 experts"));
    }
}
