//! A server of a tiny model, and what the engine makes of the same requests without it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use cadre_checkpoint::{Checkpoint, ModelConfig, Tokenizer};
use cadre_engine::{
    GenerateOptions, LoadOptions, Model, NoObserver, SamplingOptions, SessionOptions, generate,
    load,
};
use cadre_serve::{HttpLimits, ServeOptions, Server};
use cadre_testkit::TinyMoe;

pub(crate) const TEMPLATE: &str = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}\
    {% if add_generation_prompt %}[assistant]{% endif %}";

/// A model and a server of it.
pub(crate) struct Setup {
    pub(crate) model: Arc<dyn Model>,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) server: Server,
    pub(crate) session: SessionOptions,
}

pub(crate) fn session() -> SessionOptions {
    SessionOptions {
        n_ctx: Some(1024),
        ..SessionOptions::default()
    }
}

pub(crate) fn options() -> ServeOptions {
    ServeOptions {
        address: SocketAddr::from(([127, 0, 0, 1], 0)),
        names: vec!["tiny".to_owned(), "also".to_owned()],
        keys: Vec::new(),
        origins: Vec::new(),
        template: None,
        session: session(),
        parallel: 4,
        kv_memory: None,
        steps: None,
        plans: Vec::new(),
        batch: 32,
        prompt_batch: None,
        queue: 256,
        http: HttpLimits::default(),
        heeds_sigterm: false,
    }
}

/// A tiny checkpoint with a chat template and room for a thousand tokens.
pub(crate) fn checkpoint() -> Checkpoint {
    checkpoint_with(|_| {})
}

/// With another configuration.
pub(crate) fn checkpoint_with(change: impl FnOnce(&mut ModelConfig)) -> Checkpoint {
    let folder = TinyMoe::default()
        .configure(|config| {
            config.max_position_embeddings = 16_384;
            change(config);
        })
        .build()
        .unwrap();
    std::fs::write(folder.path().join("chat_template.jinja"), TEMPLATE).unwrap();
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder.path()).unwrap() {
        let path = entry.unwrap().path();
        let name: &'static str = path
            .file_name()
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned()
            .leak();
        let bytes: &'static [u8] = std::fs::read(&path).unwrap().leak();
        files.push((name, bytes));
    }
    // In memory, so that the folder need not outlive the test.
    Checkpoint::from_embedded("tiny", files.leak()).unwrap()
}

pub(crate) fn model(checkpoint: &Checkpoint) -> Arc<dyn Model> {
    let options = LoadOptions {
        n_threads: Some(1),
        ..LoadOptions::default()
    };
    load(checkpoint, &options).unwrap()
}

impl Setup {
    pub(crate) fn new() -> Self {
        Self::with(|_| {})
    }

    /// With other options than [`options`].
    pub(crate) fn with(change: impl FnOnce(&mut ServeOptions)) -> Self {
        let checkpoint = checkpoint();
        let model = model(&checkpoint);
        Self::of(&checkpoint, model, change)
    }

    /// Of this model.
    pub(crate) fn of(
        checkpoint: &Checkpoint,
        model: Arc<dyn Model>,
        change: impl FnOnce(&mut ServeOptions),
    ) -> Self {
        let mut options = options();
        change(&mut options);
        let session = options.session;
        Self {
            tokenizer: checkpoint.tokenizer().unwrap(),
            server: Server::start(checkpoint, Arc::clone(&model), options).unwrap(),
            model,
            session,
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.server.address()
    }

    /// What the engine generates after `prompt`, alone; all tokens are drawn, none stops.
    pub(crate) fn alone(&self, prompt: &[u32], n: usize, sampling: SamplingOptions) -> Vec<u32> {
        let mut session = self.model.session(&self.session).unwrap();
        let options = GenerateOptions {
            max_new_tokens: n,
            stop_tokens: Vec::new(),
            sampling,
        };
        let generated = generate(
            &*self.model,
            &mut session,
            prompt,
            &options,
            &mut NoObserver,
        );
        generated.unwrap().tokens
    }

    /// The text of tokens that follow `prompt`.
    pub(crate) fn text(&self, prompt: &[u32], tokens: &[u32]) -> String {
        let mut stream = self.tokenizer.stream_after(prompt);
        let mut text: String = tokens.iter().map(|token| stream.push(*token)).collect();
        text += &stream.finish();
        text
    }

    /// What the engine says after the text `prompt`.
    pub(crate) fn said(&self, prompt: &str, n: usize, sampling: SamplingOptions) -> String {
        let ids = self.tokenizer.encode(prompt).unwrap();
        self.text(&ids, &self.alone(&ids, n, sampling))
    }

    pub(crate) fn end(self) {
        assert!(
            self.server.end(Duration::from_secs(20)),
            "everything comes to an end"
        );
    }
}

pub(crate) fn greedy() -> SamplingOptions {
    SamplingOptions::default()
}

pub(crate) fn drawn(seed: u64) -> SamplingOptions {
    SamplingOptions {
        temperature: 1.0,
        seed,
        ..SamplingOptions::default()
    }
}
