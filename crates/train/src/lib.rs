//! Training on Burn: routers, losses, the language model, the loop.
