//! scratch
use burn::tensor::Device;
use cadre_train::{init::Init, lm::*, optimizer::*};
use std::sync::Arc;
fn main() {
    let a: Vec<usize> = std::env::args().skip(1).map(|x| x.parse().unwrap()).collect();
    let [d, layers, experts, width, k, vocab, heads, kv, hd, b, l, steps] = a[..] else { panic!() };
    let json = format!(r#"{{"model_type":"qwen3_moe","vocab_size":{vocab},"hidden_size":{d},"num_hidden_layers":{layers},"num_attention_heads":{heads},"num_key_value_heads":{kv},"head_dim":{hd},"num_experts":{experts},"num_experts_per_tok":{k},"moe_intermediate_size":{width},"norm_topk_prob":true,"rms_norm_eps":1e-6,"rope_theta":10000.0,"max_position_embeddings":1024,"tie_word_embeddings":false,"hidden_act":"silu"}}"#);
    let config = cadre_checkpoint::ModelConfig::parse("x", &json, None).unwrap();
    let init = Init { seed: 0, std: 0.02, device: Device::flex().autodiff() };
    let mut model = LanguageModel::init(&config, &init);
    let mut opt = AdamW::new(AdamWConfig::default());
    let mut s = 1u64;
    for step in 0..steps {
        let mut next = || { s = s.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407); ((s >> 33) % vocab as u64) as u32 };
        let t = std::time::Instant::now();
        let batch = Batch { tokens: std::sync::Arc::new((0..b*l).map(|_| next()).collect()), targets: Arc::new((0..b*l).map(|_| next()).collect()), seq_len: l };
        let losses = model.losses(&config, &batch).unwrap();
        let total = losses.cross_entropy.clone() + losses.balance * 0.01;
        let t1 = t.elapsed();
        let mut g = total.backward();
        let t2 = t.elapsed();
        let mut sum = GradientSum::default();
        sum.add(&model, &mut g, 1.0);
        drop(g);
        let norm = sum.norm();
        let ce: f32 = losses.cross_entropy.into_scalar();
        model = opt.step(model, sum, 3e-4, (1.0 / norm).min(1.0));
        let t3 = t.elapsed();
        println!("{step} loss {ce:.4} norm {norm:.3} fwd {:?} bwd {:?} opt {:?} tok/s {:.0}", t1, t2 - t1, t3 - t2, (b * l) as f64 / t3.as_secs_f64());
    }
}
