//! Models from the Hugging Face hub: finding them in its cache, and downloading what is missing.
//!
//! The cache has the layout of the hub's Python client, so either finds what the other brought.
//! Every file is a blob named by its content, and a snapshot folder per commit links to blobs. A
//! download becomes visible only when it is complete and checked; until then it is
//! `blobs/*.incomplete`, which the next attempt continues.

mod cache;
mod choose;
mod client;
mod download;
mod outline;
mod progress;
mod reference;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tempfile::TempDir;

use cache::RepoCache;
use choose::{Choice, INDEX, choose, weights};
use client::{Client, Content, Fault, Listing};
use download::{Job, begun, bring, is_here};
use outline::bring_outline;
use progress::{Progress, say};
pub(crate) use reference::HubRef;

use crate::cli::App;
use crate::failure::Failure;
use crate::output::bytes;

/// Requests for a listing before a hub counts as out of reach.
const ATTEMPTS: u32 = 3;

/// A model as far as it was looked for.
enum Found {
    /// In the cache, to be used as it is.
    Here(PathBuf),
    /// On the hub.
    There(Client, Listing),
}

/// The path of a model on the hub: a snapshot folder, or the (first) GGUF file in one. Downloads
/// what is missing, unless `offline` or the environment forbids it.
///
/// # Errors
/// A model that does not exist, is not accessible, or is not in the cache while offline; a full
/// disk; damaged content.
pub(crate) fn fetch(app: &App, wanted: &HubRef, offline: bool) -> Result<PathBuf> {
    let cache = cache_of(app, wanted)?;
    let (client, listing) = match find(app, &cache, wanted, offline)? {
        Found::Here(path) => return Ok(path),
        Found::There(client, listing) => (client, listing),
    };
    let job = Job {
        client: &client,
        cache: &cache,
        wanted,
        commit: &listing.commit,
    };
    let path = download(app, &job, &listing)?;
    cache.set_commit(wanted.revision(), &listing.commit)?;
    Ok(path)
}

/// As [`fetch`], but of a model that is not in the cache only what opening it reads: then the path is in a folder that
/// goes when the value does, and the weights are zeros.
///
/// # Errors
/// As [`fetch`].
pub(crate) fn fetch_outline(
    app: &App,
    wanted: &HubRef,
    offline: bool,
) -> Result<(Option<TempDir>, PathBuf)> {
    let cache = cache_of(app, wanted)?;
    let (client, listing) = match find(app, &cache, wanted, offline)? {
        Found::Here(path) => return Ok((None, path)),
        Found::There(client, listing) => (client, listing),
    };
    if cache.commit(wanted.revision()).as_ref() == Some(&listing.commit)
        && let Ok((path, note)) = cached(&cache, wanted)
    {
        note.iter().for_each(|note| say(note));
        return Ok((None, path));
    }
    let job = Job {
        client: &client,
        cache: &cache,
        wanted,
        commit: &listing.commit,
    };
    let (folder, path) = bring_outline(app, &job, &listing)?;
    Ok((Some(folder), path))
}

fn cache_of(app: &App, wanted: &HubRef) -> Result<RepoCache> {
    match &app.env.hub.cache {
        Some(root) => Ok(RepoCache::new(root, &wanted.repo)),
        None => Err(Failure::new("no folder for the hub cache is known")
            .hint("set HF_HOME")
            .into()),
    }
}

/// Looks in the cache, and then on the hub unless that is forbidden or needless.
fn find(app: &App, cache: &RepoCache, wanted: &HubRef, offline: bool) -> Result<Found> {
    let env = &app.env.hub;
    let here = cached(cache, wanted);
    // What a commit contains never changes.
    let is_settled = cache::is_commit(wanted.revision()) && here.is_ok();
    if is_settled || offline || env.offline {
        let (path, note) = here.map_err(|reason| not_cached(cache, wanted, &reason))?;
        note.iter().for_each(|note| say(note));
        return Ok(Found::Here(path));
    }
    let client = Client::new(env);
    // With a copy at hand a hub that is out of reach is not worth waiting for.
    let attempts = if here.is_ok() { 1 } else { ATTEMPTS };
    match list(&client, wanted, attempts) {
        Ok(listing) => Ok(Found::There(client, listing)),
        Err(failure) => {
            let Ok((path, _)) = here else {
                return Err(failure.into());
            };
            let folder = cache.folder();
            say(&format!(
                "{failure}; using the copy in {}",
                folder.display()
            ));
            Ok(Found::Here(path))
        }
    }
}

/// The model in the cache, and what to say about it; or why it is not there.
fn cached(cache: &RepoCache, wanted: &HubRef) -> Result<(PathBuf, Option<String>), String> {
    let commit = cache
        .commit(wanted.revision())
        .ok_or_else(|| format!("no revision `{}`", wanted.revision()))?;
    let snapshot = cache.snapshot(&commit);
    let files = cache.files(&commit);
    match choose(&files, wanted.quant.as_deref())? {
        Choice::Gguf { parts, silent } => {
            let note = (!silent).then(|| picked(wanted, &parts));
            Ok((snapshot.join(&parts[0]), note))
        }
        Choice::Folder { .. } => {
            let index = fs::read_to_string(snapshot.join(INDEX)).ok();
            let weights = weights(index.as_deref())?;
            match weights.iter().find(|file| !files.contains(file)) {
                Some(file) => Err(format!("{file} is missing")),
                None => Ok((snapshot, None)),
            }
        }
    }
}

fn not_cached(cache: &RepoCache, wanted: &HubRef, reason: &str) -> Failure {
    let folder = cache.folder();
    let what = if folder.is_dir() {
        format!("is not complete in {}: {reason}", folder.display())
    } else {
        format!("is not in the hub cache: there is no {}", folder.display())
    };
    Failure::new(format!("{wanted} {what}; offline, so it is not downloaded")).hint(format!(
        "run `cadre pull {wanted}` with a connection, without --offline and HF_HUB_OFFLINE; \
         HF_HUB_CACHE or HF_HOME say where the cache is"
    ))
}

fn list(client: &Client, wanted: &HubRef, attempts: u32) -> Result<Listing, Failure> {
    let mut attempt = 1;
    loop {
        match client.listing(wanted) {
            Ok(listing) => return Ok(listing),
            Err(Fault::Final(failure)) => return Err(failure),
            Err(Fault::Transient(reason)) if attempt >= attempts => {
                return Err(Failure::new(reason)
                    .hint("check the connection; --offline uses only what is in the cache"));
            }
            Err(Fault::Transient(reason)) => tracing::info!("{reason}; trying again"),
        }
        std::thread::sleep(std::time::Duration::from_millis(250 << attempt));
        attempt += 1;
    }
}

/// Brings the files that make up the model, those that say what it is before its weights.
fn download(app: &App, job: &Job<'_>, listing: &Listing) -> Result<PathBuf> {
    let names: Vec<String> = listing.files.iter().map(|file| file.name.clone()).collect();
    let snapshot = job.cache.snapshot(job.commit);
    let choice = choose(&names, job.wanted.quant.as_deref())
        .map_err(|reason| Failure::new(format!("{} cannot be used: {reason}", job.wanted)))?;
    match choice {
        Choice::Gguf { parts, silent } => {
            if !silent {
                say(&picked(job.wanted, &parts));
            }
            bring_all(app, job, listing, &parts)?;
            Ok(snapshot.join(&parts[0]))
        }
        Choice::Folder { small } => {
            bring_all(app, job, listing, &small)?;
            let weights = folder_weights(&snapshot, &small)?;
            bring_all(app, job, listing, &weights)?;
            Ok(snapshot)
        }
    }
}

/// The files with weights of a folder whose other files are in `snapshot`.
fn folder_weights(snapshot: &Path, small: &[String]) -> Result<Vec<String>> {
    let index = small.iter().any(|name| name == INDEX).then(|| {
        let path = snapshot.join(INDEX);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    });
    Ok(weights(index.transpose()?.as_deref()).map_err(Failure::new)?)
}

fn picked(wanted: &HubRef, parts: &[String]) -> String {
    format!(
        "{} has GGUF files only; taking {} (name another as {}:TYPE)",
        wanted.repo, parts[0], wanted.repo
    )
}

/// Brings some files of the listing, after looking whether they fit on the disk.
fn bring_all(app: &App, job: &Job<'_>, listing: &Listing, names: &[String]) -> Result<()> {
    let mut files = Vec::new();
    for name in names {
        files.push((name, content(job, listing, name)?));
    }
    let snapshot = job.cache.snapshot(job.commit);
    let is_done = |name: &str, content: &Content| {
        fs::metadata(snapshot.join(name)).is_ok_and(|file| file.len() == content.size)
    };
    files.retain(|(name, content)| !is_done(name, content));
    let missing = files
        .iter()
        .filter(|(_, content)| !is_here(job.cache, content));
    let total: u64 = missing.clone().map(|(_, content)| content.size).sum();
    let before: u64 = missing.map(|(_, content)| begun(job.cache, content)).sum();
    if total > before {
        check_space(job, total - before)?;
        let n = files.len();
        let what = format!("{}: {n} file{}", job.wanted, if n == 1 { "" } else { "s" });
        let rest = if before > 0 {
            format!(", {} of it here", bytes(before))
        } else {
            String::new()
        };
        say(&format!(
            "downloading {what}, {}{rest}, to {}",
            bytes(total),
            job.cache.folder().display()
        ));
    }
    let mut progress = Progress::new(&app.env, job.wanted.to_string(), total, before);
    for (name, content) in &files {
        bring(job, name, content, &mut progress)?;
    }
    Ok(())
}

/// Size and name of a file's content, from the listing or else by asking.
fn content(job: &Job<'_>, listing: &Listing, name: &str) -> Result<Content> {
    let Some(file) = listing.files.iter().find(|file| file.name == name) else {
        let message = format!(
            "{} names {name} in {INDEX}, and has no such file",
            job.wanted
        );
        return Err(Failure::new(message).into());
    };
    if let Some(content) = &file.content {
        return Ok(content.clone());
    }
    match job.client.content(job.wanted, job.commit, name) {
        Ok(content) => Ok(content),
        Err(Fault::Final(failure)) => Err(failure.into()),
        Err(Fault::Transient(reason)) => Err(Failure::new(reason).hint("try again").into()),
    }
}

fn check_space(job: &Job<'_>, needed: u64) -> Result<()> {
    let root = job.cache.root();
    fs::create_dir_all(root).with_context(|| format!("cannot create {}", root.display()))?;
    match fs4::available_space(root) {
        Ok(free) if free < needed => {
            let message = format!(
                "{} needs {} more in {}, where {} are free",
                job.wanted,
                bytes(needed),
                root.display(),
                bytes(free)
            );
            Err(Failure::new(message)
                .hint("free some space, or point HF_HUB_CACHE to a folder on another disk")
                .into())
        }
        Ok(_) => Ok(()),
        Err(error) => {
            tracing::warn!(%error, "cannot find out the free space of {}", root.display());
            Ok(())
        }
    }
}
