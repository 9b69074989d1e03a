//! A slot: a session, what it holds, and the job that it works on.

use cadre_engine::{Logits, Model, Sequence, Session, Steering};
use cadre_routing::Routing;

use super::draw::{Draw, Drawn, score};
use super::job::{Event, Finish, Job, JobError, Teller, failed};
use super::plan::Need;
use super::watch::Routed;
use crate::metrics::{Ended, JobClock};

/// A place for one sequence. Between jobs it keeps what it has read, for the next one that begins alike.
pub(crate) struct Slot {
    session: Session,
    /// The tokens in the session, and how it is steered.
    held: Vec<u32>,
    steering: Steering,
    running: Option<Running>,
    /// When a job ended here last; larger is later.
    used: u64,
}

/// A job in a slot.
struct Running {
    job: Job,
    teller: Teller,
    draw: Draw,
    n_drawn: usize,
    /// The token that was drawn last, which is read next.
    next: [u32; 1],
    since: u64,
    clock: JobClock,
    /// Sum over the tokens read so far of their vectors; empty where none is wanted.
    sum: Vec<f64>,
}

/// What the end of a piece of work needs.
pub(crate) struct Desk<'a> {
    pub(crate) model: &'a dyn Model,
    /// A row of logits, for scores of one that is drawn from.
    pub(crate) scratch: &'a mut Vec<f32>,
    /// What the experts did in every layer, where that is wanted.
    pub(crate) layers: Vec<(usize, Routing)>,
}

impl Slot {
    /// A slot with a new session of `model`.
    pub(crate) fn new(session: Session, model: &dyn Model) -> Self {
        Self {
            session,
            steering: model.info().steering.clone(),
            held: Vec::new(),
            running: None,
            used: 0,
        }
    }

    pub(crate) fn is_free(&self) -> bool {
        self.running.is_none()
    }

    /// Positions that its job has filled.
    pub(crate) fn n_held(&self) -> usize {
        match self.is_free() {
            true => 0,
            false => self.session.position(),
        }
    }

    /// Positions that there are.
    pub(crate) fn n_ctx(&self) -> usize {
        self.session.n_ctx()
    }

    /// When a job ended here last; larger is later.
    pub(crate) fn used(&self) -> u64 {
        self.used
    }

    /// Tokens of `job`'s prompt that need not be read here: never the last one, whose logits start the answer.
    pub(crate) fn n_known(&self, job: &Job) -> usize {
        if job.scores_prompt || job.embeds || job.steering != self.steering {
            return 0;
        }
        let pairs = self.held.iter().zip(&*job.prompt);
        let n_common = pairs.take_while(|(held, token)| held == token).count();
        let most = job.routed_from.unwrap_or(usize::MAX);
        n_common.min(job.prompt.len().saturating_sub(1)).min(most)
    }

    /// Starts a job in this slot, which is free.
    pub(crate) fn begin(
        &mut self,
        model: &dyn Model,
        mut job: Job,
        teller: Teller,
        (since, clock): (u64, JobClock),
    ) {
        let n_cached = self.n_known(&job);
        clock.started(job.prompt.len(), n_cached);
        teller.tell(Event::Started { n_cached });
        if let Err(error) = self.steer(model, &job.steering) {
            clock.ended(Ended::Failed, 0);
            return teller.tell(Event::Failed(failed(&error)));
        }
        let (options, stops) = (job.draw.clone(), job.stop_tokens.clone());
        let draw = Draw::new(options, &job.prompt, stops, job.constraint.take());
        let draw = match draw {
            Ok(draw) => draw,
            Err(error) => {
                clock.ended(Ended::Failed, 0);
                return teller.tell(Event::Failed(failed(&error)));
            }
        };
        let reads = job.scores_prompt || job.embeds || job.routed_from.is_some();
        if job.max_new_tokens == 0 && !reads {
            clock.ended(Ended::Length, 0);
            return teller.tell(Event::Done(Finish::Length));
        }
        self.session.rewind(n_cached);
        self.held.truncate(n_cached);
        self.running = Some(Running {
            job,
            teller,
            draw,
            n_drawn: 0,
            next: [0],
            since,
            clock,
            sum: Vec::new(),
        });
    }

    /// Steers the session, which forgets what it read otherwise.
    fn steer(&mut self, model: &dyn Model, steering: &Steering) -> cadre_engine::Result<()> {
        if *steering != self.steering {
            model.steer(&mut self.session, steering)?;
            self.steering = steering.clone();
            self.session.rewind(0);
            self.held.clear();
        }
        Ok(())
    }

    /// Ends the job, if nobody wants more of it.
    pub(crate) fn drop_cancelled(&mut self, now: u64) {
        let why = match &self.running {
            Some(running) if running.teller.is_alone() => Ended::Cancelled,
            // What a client finds in the text is an end like any other.
            Some(running) if running.teller.is_cancelled() => Ended::Stop,
            _ => return,
        };
        self.release(why, now);
    }

    /// Whether the experts of the next `n` tokens are to be told.
    pub(crate) fn watches(&self, n: usize) -> bool {
        let running = self.running.as_ref();
        let from = running.and_then(|running| running.job.routed_from);
        from.is_some_and(|from| self.session.position() + n > from)
    }

    pub(crate) fn need(&self) -> Option<Need> {
        let running = self.running.as_ref()?;
        let left = running
            .job
            .prompt
            .len()
            .saturating_sub(self.session.position());
        Some(Need {
            n_tokens: left.max(1),
            generates: left == 0,
            scores: running.wants_all() && left > 0,
            since: running.since,
        })
    }

    /// The next `n` tokens, as a part of a batch.
    pub(crate) fn sequence(&mut self, n: usize) -> Option<Sequence<'_>> {
        let running = self.running.as_ref()?;
        let at = self.session.position();
        let prompt = &running.job.prompt;
        let (tokens, want) = match prompt.get(at..at + n) {
            Some(piece) if n > 0 => {
                let want = match (running.wants_all(), at + n == prompt.len()) {
                    (true, _) => Logits::All,
                    (false, true) => Logits::Last,
                    (false, false) => Logits::None,
                };
                (piece, want)
            }
            _ => (&running.next[..], Logits::Last),
        };
        Some(Sequence {
            session: &mut self.session,
            tokens,
            want,
        })
    }

    /// Takes note of what was computed: `rows` are the logits of the piece that was read last, `[n, vocab_size]`.
    pub(crate) fn advance(&mut self, rows: &mut [f32], desk: &mut Desk<'_>, now: u64) {
        let Some(running) = &mut self.running else {
            return;
        };
        let from = self.held.len();
        let to = self.session.position();
        let prompt = &running.job.prompt;
        match prompt.get(from..to) {
            Some(piece) => self.held.extend_from_slice(piece),
            None => self.held.extend(running.next),
        }
        // Before the token that follows, which may be the last that anybody listens to.
        if !desk.layers.is_empty() {
            running.teller.tell(Event::Routed(Routed {
                first: from,
                tokens: self.held[from..].to_vec(),
                layers: std::mem::take(&mut desk.layers),
            }));
        }
        let vocab = desk.model.info().vocab_size;
        let ended = running.take_rows(rows, vocab, to, desk);
        let ended = match ended {
            Ok(None) if running.n_drawn > 0 && self.session.free() == 0 => Some(Finish::Length),
            Ok(ended) => ended,
            Err(error) => return self.fail(error, now),
        };
        if let Some(finish) = ended {
            running.teller.tell(Event::Done(finish));
            let why = match finish {
                Finish::Stop => Ended::Stop,
                Finish::Length => Ended::Length,
            };
            self.release(why, now);
        }
    }

    /// Whether its prompt becomes a vector: it wants vectors in place of logits.
    pub(crate) fn embeds(&self) -> bool {
        self.running
            .as_ref()
            .is_some_and(|running| running.job.embeds)
    }

    /// Takes note of what was computed: `rows` are the vectors of the piece that was read last, `[n, d_model]`.
    pub(crate) fn embed(&mut self, rows: &[f32], d_model: usize, now: u64) {
        let Some(running) = &mut self.running else {
            return;
        };
        let to = self.session.position();
        if let Some(piece) = running.job.prompt.get(self.held.len()..to) {
            self.held.extend_from_slice(piece);
        }
        running.sum.resize(d_model, 0.0);
        for row in rows.chunks_exact(d_model.max(1)) {
            for (sum, x) in running.sum.iter_mut().zip(row) {
                *sum += f64::from(*x);
            }
        }
        let n = running.job.prompt.len();
        if to >= n {
            let mean = running.sum.iter().map(|sum| (sum / n as f64) as f32);
            running.teller.tell(Event::Embedding(mean.collect()));
            running.teller.tell(Event::Done(Finish::Length));
            self.release(Ended::Length, now);
        }
    }

    /// Ends the job with an error, if there is one.
    pub(crate) fn fail(&mut self, error: JobError, now: u64) {
        if let Some(running) = &self.running {
            running.teller.tell(Event::Failed(error));
        }
        self.release(Ended::Failed, now);
    }

    /// Replaces the session, whose state is in doubt.
    pub(crate) fn renew(&mut self, session: Session, model: &dyn Model) {
        self.session = session;
        self.steering = model.info().steering.clone();
        self.held.clear();
    }

    fn release(&mut self, why: Ended, now: u64) {
        if let Some(running) = self.running.take() {
            running.clock.ended(why, running.n_drawn);
        }
        self.used = now;
        self.held.truncate(self.session.position());
    }
}

impl Running {
    /// Whether something is wanted of every token of the prompt.
    fn wants_all(&self) -> bool {
        self.job.scores_prompt || self.job.embeds
    }

    /// Scores and draws from the logits of the piece that ends before position `to`; why the job has ended, if so.
    fn take_rows(
        &mut self,
        rows: &mut [f32],
        vocab: usize,
        to: usize,
        desk: &mut Desk<'_>,
    ) -> Result<Option<Finish>, JobError> {
        let n_rows = rows.len() / vocab.max(1);
        let mut scores = Vec::new();
        let mut ended = None;
        for (i, row) in rows.chunks_exact_mut(vocab.max(1)).enumerate() {
            let is_last = i + 1 == n_rows;
            match self.job.prompt.get(to + i + 1 - n_rows) {
                // The row foretells a token of the prompt.
                Some(token) if self.job.scores_prompt => {
                    let n = self.job.alternatives.unwrap_or(0);
                    scores.extend(score(desk.model, row, n, *token));
                }
                Some(_) => {}
                None if is_last => {
                    if !scores.is_empty() {
                        self.teller.tell(Event::Prompt(std::mem::take(&mut scores)));
                    }
                    ended = self.draw(row, desk)?;
                }
                None => {}
            }
        }
        if !scores.is_empty() {
            self.teller.tell(Event::Prompt(scores));
        }
        Ok(ended)
    }

    fn draw(&mut self, row: &mut [f32], desk: &mut Desk<'_>) -> Result<Option<Finish>, JobError> {
        if self.job.max_new_tokens == 0 {
            return Ok(Some(Finish::Length));
        }
        if self.job.alternatives.is_some() {
            desk.scratch.clear();
            desk.scratch.extend_from_slice(row);
        }
        let Drawn { token, is_last } = self.draw.draw(row)?;
        if self.draw.is_stop(token) {
            return Ok(Some(Finish::Stop));
        }
        let scored = self
            .job
            .alternatives
            .and_then(|n| score(desk.model, desk.scratch, n, token));
        self.teller.tell(Event::Token {
            token,
            scored: scored.map(Box::new),
        });
        self.clock.token();
        self.n_drawn += 1;
        self.next = [token];
        if is_last {
            return Ok(Some(Finish::Stop));
        }
        Ok((self.n_drawn == self.job.max_new_tokens).then_some(Finish::Length))
    }
}
