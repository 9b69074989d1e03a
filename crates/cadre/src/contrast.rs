//! Flags for self-contrast, and the sessions that generate with or without it.

use anyhow::Result;
use cadre_engine::{
    Contrast, ContrastSessions, GenerateOptions, Generated, Hooks, Model, Session, SessionOptions,
    generate, generate_contrasted,
};

/// Two choices of experts set against each other.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Self-contrast (every token is computed twice)")]
#[group(id = "contrasting", multiple = true)]
pub(crate) struct ContrastArgs {
    /// Push tokens away from what the model says with weaker experts, this far: above 0, such as 0.5 (SCMoE).
    #[arg(long, value_name = "BETA")]
    contrast: Option<f32>,
    /// Ranks of the weaker experts, which then are all that a token gets; 1 is the best.
    #[arg(
        long,
        value_name = "RANKS",
        value_delimiter = ',',
        default_value = "2",
        requires = "contrast"
    )]
    contrast_ranks: Vec<usize>,
    /// Ban tokens less probable than this part of the most probable one.
    #[arg(
        long,
        value_name = "ALPHA",
        default_value_t = 0.1,
        requires = "contrast"
    )]
    contrast_alpha: f32,
}

impl ContrastArgs {
    /// Sessions that one text takes.
    pub(crate) fn n_sessions(&self) -> usize {
        1 + usize::from(self.contrast.is_some())
    }

    /// What outputs say of it.
    pub(crate) fn said(&self) -> Option<String> {
        let beta = self.contrast?;
        let ranks: Vec<String> = self.contrast_ranks.iter().map(usize::to_string).collect();
        let (ranks, alpha) = (ranks.join(","), self.contrast_alpha);
        Some(format!(
            "contrast={beta} contrast-ranks={ranks} contrast-alpha={alpha}"
        ))
    }
}

/// What one text is held in.
pub(crate) enum Sessions {
    /// One session.
    Alone(Box<Session>),
    /// One for each choice of experts.
    Contrasted(Box<ContrastSessions>),
}

impl Sessions {
    /// New, empty ones.
    pub(crate) fn new(
        model: &dyn Model,
        options: &SessionOptions,
        args: &ContrastArgs,
    ) -> Result<Self> {
        let Some(beta) = args.contrast else {
            return Ok(Self::Alone(Box::new(model.session(options)?)));
        };
        let strong = model.info().steering.clone();
        let ranks = args.contrast_ranks.clone();
        let contrast = Contrast::with_ranks(strong, ranks, beta, args.contrast_alpha);
        let both = ContrastSessions::new(model, options, contrast)?;
        Ok(Self::Contrasted(Box::new(both)))
    }

    /// The session whose positions are those of the text.
    pub(crate) fn first(&self) -> &Session {
        match self {
            Self::Alone(session) => session,
            Self::Contrasted(both) => both.strong(),
        }
    }

    /// Forgets the tokens from `position` on.
    pub(crate) fn rewind(&mut self, position: usize) {
        match self {
            Self::Alone(session) => session.rewind(position),
            Self::Contrasted(both) => both.rewind(position),
        }
    }

    /// Reads `prompt` and continues it.
    pub(crate) fn generate(
        &mut self,
        model: &dyn Model,
        prompt: &[u32],
        options: &GenerateOptions,
        hooks: &mut dyn Hooks,
    ) -> cadre_engine::Result<Generated> {
        match self {
            Self::Alone(session) => generate(model, session, prompt, options, hooks),
            Self::Contrasted(both) => generate_contrasted(model, both, prompt, options, hooks),
        }
    }
}
