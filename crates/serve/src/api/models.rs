//! `/v1/models`: what is served.

use serde_json::{Value, json};

use crate::served::Served;

/// The list.
pub(crate) fn list(served: &Served) -> Value {
    let models: Vec<Value> = served.names.iter().map(|name| one(served, name)).collect();
    json!({"object": "list", "data": models})
}

/// One of them, by a name that it has.
pub(crate) fn one(served: &Served, name: &str) -> Value {
    let info = served.model.info();
    json!({
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "cadre",
        "max_model_len": served.n_ctx,
        "meta": {
            "origin": served.origin,
            "digest": served.digest,
            "model_type": info.model_type,
            "n_vocab": info.vocab_size,
            "n_ctx_train": info.max_context,
            "n_embd": info.d_model,
            "n_layers": info.n_layers,
            "n_experts": info.n_experts,
            "top_k": info.top_k,
            "moe_layers": info.moe_layers,
            "experts_per_layer": info.experts_per_layer,
            "n_null": info.n_null,
            "has_chat_template": served.has_chat_template(),
            "plans": served.plans.iter().map(|(name, _)| name).collect::<Vec<_>>(),
            "returns_routing": !info.moe_layers.is_empty(),
            "n_params": info.n_params,
            "n_active_params": info.n_active_params,
            "size": info.weight_bytes,
            "steering": (!info.steering.is_empty()).then(|| info.steering.to_string()),
            "lossy": (!info.lossy.is_none()).then(|| info.lossy.to_string()),
        },
    })
}
