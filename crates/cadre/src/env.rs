//! Every environment variable that Cadre reads, its arguments, and the state of the terminal.

use std::ffi::OsString;
use std::fmt;
use std::io::IsTerminal;
use std::path::PathBuf;

/// The environment, read once at the start.
#[derive(Debug, Clone)]
pub(crate) struct Env {
    /// `RUST_LOG`: filter of log lines; overrides `-v`.
    pub(crate) rust_log: Option<String>,
    /// Whether colour may be used at all: `NO_COLOR` is unset or empty, and `TERM` is not `dumb`.
    pub(crate) allows_color: bool,
    /// `COLORTERM` promises 24-bit colour.
    pub(crate) true_color: bool,
    /// Columns of the terminal; 80 when it is none.
    pub(crate) width: usize,
    /// Whether standard output is a terminal.
    pub(crate) stdout_is_terminal: bool,
    /// Whether standard error is a terminal.
    pub(crate) stderr_is_terminal: bool,
    /// Whether standard input is a terminal.
    pub(crate) stdin_is_terminal: bool,
    /// Folder of what can be made again: `cadre` in `XDG_CACHE_HOME` or in `~/.cache`. `None` when no home folder is known.
    pub(crate) cache: Option<PathBuf>,
    /// `CADRE_API_KEY`: a key that requests to `cadre serve` need.
    pub(crate) api_key: Option<Secret>,
    /// The hub and its cache.
    pub(crate) hub: HubEnv,
}

/// What the environment says about the Hugging Face hub, with the meaning that its Python client
/// gives these names.
#[derive(Debug, Clone)]
pub(crate) struct HubEnv {
    /// Folder of cached models: `HF_HUB_CACHE`, else the older `HUGGINGFACE_HUB_CACHE`, else `hub`
    /// in `HF_HOME`. `None` when none of these and no home folder is known.
    pub(crate) cache: Option<PathBuf>,
    /// `HF_ENDPOINT` without a slash at its end.
    pub(crate) endpoint: String,
    /// `HF_TOKEN`.
    pub(crate) token: Option<Secret>,
    /// Where a token may be otherwise: `HF_TOKEN_PATH`, else `token` in `HF_HOME`.
    pub(crate) token_file: Option<PathBuf>,
    /// `HF_HUB_OFFLINE` is 1, on, yes or true.
    pub(crate) offline: bool,
    /// `ALL_PROXY`, `HTTPS_PROXY` or `HTTP_PROXY`, minus `NO_PROXY`.
    pub(crate) proxy: Option<ureq::Proxy>,
}

/// Text that is not shown by `{:?}`.
#[derive(Clone)]
pub(crate) struct Secret(pub(crate) String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// What the program was called with, its own name first.
pub(crate) fn arguments() -> impl Iterator<Item = OsString> {
    std::env::args_os()
}

impl Env {
    /// Reads the environment of the process.
    pub(crate) fn read() -> Self {
        Self {
            rust_log: var("RUST_LOG"),
            allows_color: var("NO_COLOR").is_none() && var("TERM").as_deref() != Some("dumb"),
            true_color: matches!(var("COLORTERM").as_deref(), Some("truecolor" | "24bit")),
            width: terminal_size::terminal_size().map_or(80, |(width, _)| usize::from(width.0)),
            stdout_is_terminal: std::io::stdout().is_terminal(),
            stderr_is_terminal: std::io::stderr().is_terminal(),
            stdin_is_terminal: std::io::stdin().is_terminal(),
            cache: caches().map(|folder| folder.join("cadre")),
            api_key: var("CADRE_API_KEY").map(Secret),
            hub: HubEnv::read(),
        }
    }
}

impl HubEnv {
    fn read() -> Self {
        let hf_home = folder("HF_HOME").or_else(|| Some(caches()?.join("huggingface")));
        let in_home = |name: &str| hf_home.as_ref().map(|home| home.join(name));
        let offline = var("HF_HUB_OFFLINE").unwrap_or_default();
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        Self {
            cache: folder("HF_HUB_CACHE")
                .or_else(|| folder("HUGGINGFACE_HUB_CACHE"))
                .or_else(|| in_home("hub")),
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: var("HF_TOKEN").map(|token| Secret(token.trim().to_owned())),
            token_file: folder("HF_TOKEN_PATH").or_else(|| in_home("token")),
            offline: ["1", "on", "yes", "true"]
                .iter()
                .any(|yes| offline.eq_ignore_ascii_case(yes)),
            proxy: ureq::Proxy::try_from_env(),
        }
    }
}

/// A variable that is set and not empty.
fn var(name: &str) -> Option<String> {
    #[expect(clippy::disallowed_methods, reason = "this file is the one place")]
    let value = std::env::var(name);
    value.ok().filter(|value| !value.is_empty())
}

/// Where programs keep what can be made again.
fn caches() -> Option<PathBuf> {
    folder("XDG_CACHE_HOME").or_else(|| Some(std::env::home_dir()?.join(".cache")))
}

/// A variable that holds a path, which may start with `~/`.
fn folder(name: &str) -> Option<PathBuf> {
    #[expect(clippy::disallowed_methods, reason = "this file is the one place")]
    let value = std::env::var_os(name).filter(|value| !value.is_empty())?;
    let path = PathBuf::from(value);
    match (path.strip_prefix("~"), std::env::home_dir()) {
        (Ok(rest), Some(home)) => Some(home.join(rest)),
        _ => Some(path),
    }
}
