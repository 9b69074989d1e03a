//! From the events of jobs to an answer: all of it at once, or as server-sent events.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderName, HeaderValue, StatusCode};
use hyper::body::Frame;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::choice::{Choice, Piece};
use super::error::{ApiError, Result, json_response};
use super::voice::{Usage, Voice};
use crate::panics::{Panicked, caught};
use crate::schedule::{Event, JobError, Jobs};
use crate::served::Served;

/// Between two signs of life while nothing else is to be said: programs in between close silent connections.
const PING: Duration = Duration::from_secs(15);
/// Events that wait for a client that reads slowly.
const AHEAD: usize = 32;

/// The answers of a request while they grow.
pub(crate) struct Growing {
    served: Arc<Served>,
    jobs: Jobs,
    choices: Vec<Choice>,
    n_left: usize,
    usage: Usage,
}

impl Growing {
    /// `n_prompt` are the tokens of all prompts, each counted once.
    pub(crate) fn new(
        served: Arc<Served>,
        jobs: Jobs,
        choices: Vec<Choice>,
        n_prompt: usize,
    ) -> Self {
        Self {
            served,
            jobs,
            n_left: choices.len(),
            choices,
            usage: Usage {
                n_prompt,
                ..Usage::default()
            },
        }
    }

    /// What comes next, and to which answer it belongs; `None` at the end. Nothing is lost when it is dropped while it waits.
    pub(crate) async fn next(&mut self) -> Option<Result<(usize, Piece)>> {
        while self.n_left > 0 {
            let Some((index, event)) = self.jobs.events.recv().await else {
                return Some(Err(JobError::Ended.into()));
            };
            let Some(choice) = self.choices.get_mut(index) else {
                continue;
            };
            if choice.has_ended {
                continue;
            }
            let tokenizer = &self.served.tokenizer;
            let piece = match event {
                Event::Started { n_cached } => {
                    let known = self.usage.n_cached + n_cached;
                    self.usage.n_cached = known.min(self.usage.n_prompt);
                    continue;
                }
                Event::Prompt(scores) => {
                    choice.prompt(scores);
                    continue;
                }
                // Of jobs that are told elsewhere.
                Event::Embedding(_) => continue,
                Event::Routed(routed) => {
                    choice.routed(routed);
                    continue;
                }
                Event::Token { token, scored } => {
                    choice.token(token, scored.map(|scored| *scored), tokenizer)
                }
                Event::Ending(scored) => choice.ending(*scored, tokenizer),
                Event::Done(finish) => choice.end(finish, tokenizer),
                Event::Failed(error) => return Some(Err(error.into())),
            };
            if choice.has_ended {
                self.n_left -= 1;
                // A stop string, of which the scheduler knows nothing.
                self.jobs.cancel(index);
            }
            if !piece.is_empty() {
                return Some(Ok((index, piece)));
            }
        }
        None
    }

    fn usage(&self) -> Usage {
        Usage {
            n_new: self.choices.iter().map(|choice| choice.n_tokens).sum(),
            ..self.usage
        }
    }
}

/// The whole answer.
pub(crate) async fn whole(mut growing: Growing, voice: Box<dyn Voice>) -> Result<Response> {
    let mut answers: Vec<Piece> = growing.choices.iter().map(|_| Piece::default()).collect();
    while let Some(next) = growing.next().await {
        let (index, piece) = next?;
        answers[index].append(piece);
    }
    let answer = voice.whole(&answers, growing.usage(), &growing.served);
    Ok(json_response(StatusCode::OK, &answer))
}

/// The answer as it grows. The jobs are cancelled when the client goes away.
pub(crate) fn stream(growing: Growing, mut voice: Box<dyn Voice>) -> Response {
    let (sender, pieces) = mpsc::channel(AHEAD);
    tokio::spawn(async move {
        let pumped = caught(pump(growing, &mut *voice, &sender)).await;
        let error = match pumped {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error,
            Err(panic) => panic.into(),
        };
        // After this nothing follows, not even the mark of the end: the answer is incomplete.
        let _ = sender.send(voice.failed(&error)).await;
    });
    let mut response = Response::new(Body::new(Pieces(pieces)));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // nginx would collect the events otherwise.
    let buffering = HeaderName::from_static("x-accel-buffering");
    headers.insert(buffering, HeaderValue::from_static("no"));
    response
}

/// A body whose pieces come until the sender is dropped.
struct Pieces(mpsc::Receiver<Bytes>);

impl hyper::body::Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let polled = self.0.poll_recv(context);
        polled.map(|piece| piece.map(|piece| Ok(Frame::data(piece))))
    }
}

/// Sends events until there are no more, or nobody listens.
async fn pump(
    mut growing: Growing,
    voice: &mut dyn Voice,
    sender: &mpsc::Sender<Bytes>,
) -> Result<()> {
    let mut events = voice.begin(growing.choices.len(), growing.usage());
    loop {
        for event in events.drain(..) {
            if sender.send(event).await.is_err() {
                return Ok(());
            }
        }
        let next = tokio::select! {
            () = sender.closed() => return Ok(()),
            next = timeout(PING, growing.next()) => next,
        };
        events = match next {
            Err(_) => vec![voice.ping()],
            Ok(None) => break,
            Ok(Some(next)) => {
                let (index, piece) = next?;
                voice.piece(index, &piece, &growing.served)
            }
        };
    }
    for event in voice.end(growing.usage()) {
        // Whoever has gone does not need it.
        let _ = sender.send(event).await;
    }
    Ok(())
}

impl From<Panicked> for ApiError {
    fn from(_: Panicked) -> Self {
        JobError::Panicked.into()
    }
}
