//! Interim router.
use burn::tensor::{Tensor, TensorData, Int, activation::softmax};
use cadre_routing::{Loads, Policy, Routing, RoutingError};
#[derive(Clone, Debug)]
pub struct TopK { pub n_experts: usize, pub top_k: usize, pub norm_topk_prob: bool }
pub struct Routed { pub logits: Tensor<2>, pub probs: Tensor<2>, pub ids: Vec<u16>, pub weights: Tensor<2>, pub loads: Loads }
impl TopK {
    pub fn route(&self, logits: Tensor<2>) -> Result<Routed, RoutingError> {
        let values = logits.to_data().to_vec::<f32>().expect("f32");
        let policy = cadre_routing::policies::TopK::new(self.n_experts, self.top_k, self.norm_topk_prob)?;
        let mut routing = Routing::new();
        policy.route(&values, &mut routing)?;
        let mut loads = Loads::new(self.n_experts);
        loads.add_routing(&routing)?;
        loads.add_logits(&values)?;
        let ids = routing.experts().to_vec();
        let n = ids.len() / self.top_k;
        let idx: Vec<i64> = ids.iter().map(|&i| i as i64).collect();
        let idx = Tensor::<2, Int>::from_data(TensorData::new(idx, [n, self.top_k]), &logits.device());
        let probs = softmax(logits.clone(), 1);
        let w = probs.clone().gather(1, idx);
        let weights = if self.norm_topk_prob { w.clone() / w.sum_dim(1) } else { w };
        Ok(Routed { logits, probs, ids, weights, loads })
    }
}
pub mod losses {
    use burn::tensor::Tensor;
    pub fn balance(probs: Tensor<2>, counts: &[u64]) -> Tensor<1> {
        let total: u64 = counts.iter().sum();
        let n = counts.len();
        let f: Vec<f32> = counts.iter().map(|&c| c as f32 / total as f32 * n as f32).collect();
        let f = Tensor::<1>::from_floats(f.as_slice(), &probs.device()).reshape([1, n]);
        (probs.mean_dim(0) * f).sum()
    }
    pub fn z(logits: Tensor<2>) -> Tensor<1> {
        let m = logits.clone().max_dim(1).detach();
        let lse = (logits - m.clone()).exp().sum_dim(1).log() + m;
        lse.powf_scalar(2.0).mean()
    }
}
