//! The architectures, one file each: which blocks a layer is made of. What a block does follows from the configuration.

pub(crate) mod cadre_moe;
pub(crate) mod deepseek_v2;
pub(crate) mod deepseek_v3;
pub(crate) mod gemma3_text;
pub(crate) mod glm4_moe;
pub(crate) mod gpt_oss;
pub(crate) mod granitemoe;
pub(crate) mod llama;
pub(crate) mod mistral;
pub(crate) mod mixtral;
pub(crate) mod olmoe;
pub(crate) mod phimoe;
pub(crate) mod qwen2;
pub(crate) mod qwen2_moe;
pub(crate) mod qwen3;
pub(crate) mod qwen3_moe;
