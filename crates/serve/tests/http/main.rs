//! The server over real connections: what clients get is what the engine gives, whatever the others do.
#![expect(clippy::unwrap_used, reason = "a failure here is a failed test")]

mod access;
mod chat;
mod client;
mod completions;
mod contrast;
mod embeddings;
mod experts;
mod faults;
mod load;
mod memory;
mod messages;
mod protocol;
mod setup;
mod steps;
