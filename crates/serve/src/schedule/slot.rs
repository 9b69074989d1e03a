//! A slot: one or two sessions, what they hold, and the job that they work on.

use cadre_engine::{KV_BLOCK, Logits, Model, Sequence};
use cadre_routing::Routing;

use super::draw::{Draw, Drawn, score};
use super::job::{Event, Finish, Job, JobError, Pooling, Teller, failed};
use super::lane::{Lane, Rooms};
use super::plan::Need;
use super::watch::Routed;
use crate::metrics::{Ended, JobClock};

/// A place for one sequence. Between jobs it keeps what it has read, for the next one that begins alike.
pub(crate) struct Slot {
    lane: Lane,
    /// Reads the same tokens with weaker experts, for a job that contrasts the two.
    weak: Option<Lane>,
    /// The tokens in the sessions.
    held: Vec<u32>,
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
    /// The prompt, and what was drawn after it. The last token is not read yet.
    text: Vec<u32>,
    /// Tokens of the text whose logits have been used. There are more than the sessions hold when their memory was taken
    /// away: those are read again, and nothing is told of them.
    told: usize,
    /// Whether it may take memory bit by bit: it had room for all that it has to read.
    is_admitted: bool,
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
    /// A slot with a new session.
    pub(crate) fn new(lane: Lane) -> Self {
        Self {
            lane,
            weak: None,
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
            false => self.lane.session.position() * self.n_lanes(),
        }
    }

    /// When a job ended here last; larger is later.
    pub(crate) fn used(&self) -> u64 {
        self.used
    }

    /// When its job began; larger is later.
    pub(crate) fn since(&self) -> Option<u64> {
        self.running.as_ref().map(|running| running.since)
    }

    fn n_lanes(&self) -> usize {
        1 + usize::from(self.weak.is_some())
    }

    /// Tokens of `job`'s prompt that this slot holds and that need not be read.
    pub(crate) fn n_known(&self, job: &Job) -> usize {
        let weak = job.contrast.as_ref().map(|contrast| &contrast.weak);
        let own = self.weak.as_ref().map(|lane| &lane.steering);
        if job.steering != self.lane.steering || weak.is_some() && weak != own {
            return 0;
        }
        let pairs = self.held.iter().zip(job.reusable());
        pairs.take_while(|(held, token)| held == token).count()
    }

    /// Starts a job in this slot, which is free.
    pub(crate) fn begin(
        &mut self,
        (model, rooms): (&dyn Model, &mut Rooms),
        mut job: Job,
        teller: Teller,
        (since, clock): (u64, JobClock),
    ) {
        let n_cached = match self.prepare(model, rooms, &job, since) {
            Ok(n_cached) => n_cached,
            Err(error) => {
                clock.ended(Ended::Failed, 0);
                return teller.tell(Event::Failed(failed(&error)));
            }
        };
        clock.started(job.prompt.len(), n_cached);
        teller.tell(Event::Started { n_cached });
        let (options, stops) = (job.draw.clone(), job.stop_tokens.clone());
        let draw = Draw::new(options, &job.prompt, stops, job.constraint.take());
        let draw = match draw {
            Ok(draw) => draw,
            Err(error) => {
                clock.ended(Ended::Failed, 0);
                return teller.tell(Event::Failed(failed(&error)));
            }
        };
        let reads = job.scores_prompt || job.embeds.is_some() || job.routed_from.is_some();
        if job.max_new_tokens == 0 && !reads {
            clock.ended(Ended::Length, 0);
            return teller.tell(Event::Done(Finish::Length));
        }
        self.running = Some(Running {
            text: job.prompt.to_vec(),
            told: n_cached,
            job,
            teller,
            draw,
            n_drawn: 0,
            is_admitted: false,
            since,
            clock,
            sum: Vec::new(),
        });
    }

    /// Brings the sessions to where `job` begins: behind what this slot holds of its prompt, or what others have left, if
    /// that is more. Returns how many tokens need not be read.
    fn prepare(
        &mut self,
        model: &dyn Model,
        rooms: &mut Rooms,
        job: &Job,
        now: u64,
    ) -> cadre_engine::Result<usize> {
        let n_known = self.n_known(job);
        let steered = self.steer(model, rooms, job);
        // Whoever is steered otherwise than before has forgotten.
        self.held.truncate(self.lane.session.position());
        steered?;
        Ok(self.recall(rooms, job.reusable(), (n_known, now)))
    }

    fn steer(&mut self, model: &dyn Model, rooms: &Rooms, job: &Job) -> cadre_engine::Result<()> {
        let weak = self.weak.take();
        self.lane.steer(model, &job.steering)?;
        if let Some(contrast) = &job.contrast {
            let mut weak = match weak {
                Some(weak) => weak,
                None => rooms.lane(model)?,
            };
            weak.steer(model, &contrast.weak)?;
            self.weak = Some(weak);
        }
        Ok(())
    }

    /// Keeps the first `n_known` tokens of what the sessions hold, or takes over more of `tokens` that others have left.
    fn recall(&mut self, rooms: &mut Rooms, tokens: &[u32], (n_known, now): (usize, u64)) -> usize {
        let mut find = |lane: &Lane| rooms.prefixes.find(&lane.steering, tokens, now);
        let found = find(&self.lane);
        let found_weak = self.weak.as_ref().map(find);
        let n_blocks = found_weak
            .as_ref()
            .map_or(found.len(), |weak| weak.len().min(found.len()));
        if n_blocks * KV_BLOCK > n_known {
            self.lane.begin_with(&found[..n_blocks]);
            if let (Some(lane), Some(found)) = (&mut self.weak, found_weak) {
                lane.begin_with(&found[..n_blocks]);
            }
            let n = n_blocks * KV_BLOCK;
            self.held.clear();
            self.held.extend_from_slice(&tokens[..n]);
            return n;
        }
        self.rewind(n_known);
        n_known
    }

    /// Forgets the tokens from `position` on.
    fn rewind(&mut self, position: usize) {
        self.lane.rewind(position);
        if let Some(weak) = &mut self.weak {
            weak.rewind(position);
        }
        self.held.truncate(position);
    }

    /// Bytes of keys and values that reading `n` more tokens may take.
    pub(crate) fn bytes_to_take(&self, n: usize) -> usize {
        let weak = self.weak.as_ref();
        let weak = weak.map_or(0, |lane| lane.session.kv_bytes_to_take(n));
        self.lane.session.kv_bytes_to_take(n) + weak
    }

    /// Tokens up to the end of the block that it is in.
    pub(crate) fn n_to_block_end(&self) -> usize {
        KV_BLOCK - self.lane.session.position() % KV_BLOCK
    }

    /// Tokens that it has to read before it may go on by single ones, if it has not been admitted to do so.
    pub(crate) fn n_to_admit(&self) -> Option<usize> {
        let running = self
            .running
            .as_ref()
            .filter(|running| !running.is_admitted)?;
        Some(running.text.len() - self.lane.session.position())
    }

    pub(crate) fn admit(&mut self) {
        if let Some(running) = &mut self.running {
            running.is_admitted = true;
        }
    }

    /// Whether it holds what could be given up.
    pub(crate) fn holds_any(&self) -> bool {
        !self.held.is_empty()
    }

    /// Forgets what the sessions hold. A job that is there reads it again when there is room.
    pub(crate) fn give_up(&mut self) {
        self.rewind(0);
        if let Some(running) = &mut self.running {
            running.is_admitted = false;
        }
    }

    /// Of a job that has to read again: takes over what is still known of it.
    pub(crate) fn resume(&mut self, rooms: &mut Rooms, now: u64) {
        let Some(running) = &self.running else {
            return;
        };
        if self.held.is_empty() && running.told > 0 {
            let tokens = running.text[..running.told].to_vec();
            self.recall(rooms, &tokens, (0, now));
        }
    }

    /// Makes known what has been read, and of a job that has ended, until when it was used.
    pub(crate) fn publish(&mut self, rooms: &mut Rooms, now: u64) {
        let has_ended = self.is_free();
        for lane in std::iter::once(&mut self.lane).chain(&mut self.weak) {
            lane.publish(&self.held, &mut rooms.prefixes, now);
            if has_ended {
                rooms.prefixes.leave(&lane.steering, &self.held, now);
            }
        }
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
        let at = self.lane.session.position();
        let running = self.running.as_ref().filter(|running| running.told <= at);
        let from = running.and_then(|running| running.job.routed_from);
        from.is_some_and(|from| at + n > from)
    }

    pub(crate) fn need(&self) -> Option<Need> {
        let running = self.running.as_ref()?;
        let at = self.lane.session.position();
        let again = running.told.saturating_sub(at);
        let left = match again {
            0 => running.text.len() - at,
            _ => again,
        };
        let n_prompt = running.job.prompt.len();
        Some(Need {
            n_tokens: left,
            n_lanes: self.n_lanes(),
            generates: again == 0 && at >= n_prompt,
            scores: running.wants_all() && again == 0 && at < n_prompt,
            since: running.since,
        })
    }

    /// The next `n` tokens, as parts of a batch: one of each lane.
    pub(crate) fn sequences(&mut self, n: usize) -> Option<(Sequence<'_>, Option<Sequence<'_>>)> {
        let running = self.running.as_ref()?;
        let at = self.lane.session.position();
        let tokens = running.text.get(at..at + n)?;
        let want = match (running.wants_all(), at + n == running.text.len()) {
            _ if running.told > at => Logits::None,
            (true, _) => Logits::All,
            (false, true) => Logits::Last,
            (false, false) => Logits::None,
        };
        let first = Sequence {
            session: &mut self.lane.session,
            tokens,
            want,
        };
        // Scores are the model's own; the other side counts only where something is drawn.
        let draws = want != Logits::None && at + n == running.text.len();
        let second = self.weak.as_mut().map(|weak| Sequence {
            session: &mut weak.session,
            tokens,
            want: match draws {
                true => Logits::Last,
                false => Logits::None,
            },
        });
        Some((first, second))
    }

    /// Takes note of what was computed: `rows` are the logits of the piece that was read last, `[n, vocab_size]`, and
    /// `weak` those of its last token by the weaker experts, where there are some.
    pub(crate) fn advance(
        &mut self,
        rows: &mut [f32],
        weak: &[f32],
        desk: &mut Desk<'_>,
        now: u64,
    ) {
        let Some((from, to)) = self.note() else {
            return;
        };
        let is_full = self.lane.session.free() == 0;
        let Some(running) = &mut self.running else {
            return;
        };
        if running.told >= to {
            // Read again: all of it was told before.
            return;
        }
        running.told = to;
        // Before the token that follows, which may be the last that anybody listens to.
        if !desk.layers.is_empty() {
            running.teller.tell(Event::Routed(Routed {
                first: from,
                tokens: self.held[from..].to_vec(),
                layers: std::mem::take(&mut desk.layers),
            }));
        }
        let vocab = desk.model.info().vocab_size;
        let ended = running.take_rows((rows, weak), vocab, to, desk);
        let ended = match ended {
            Ok(None) if running.n_drawn > 0 && is_full => Some(Finish::Length),
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

    /// Takes the tokens that the sessions have read into what the slot holds; the first of them, and the end.
    fn note(&mut self) -> Option<(usize, usize)> {
        let running = self.running.as_ref()?;
        let (from, to) = (self.held.len(), self.lane.session.position());
        self.held.extend_from_slice(running.text.get(from..to)?);
        Some((from, to))
    }

    /// Whether its prompt becomes a vector: it wants vectors in place of logits.
    pub(crate) fn embeds(&self) -> bool {
        self.running
            .as_ref()
            .is_some_and(|running| running.job.embeds.is_some())
    }

    /// Takes note of what was computed: `rows` are the vectors of the piece that was read last, `[n, d_model]`, or of its last token
    /// where no other counts.
    pub(crate) fn embed(&mut self, rows: &[f32], d_model: usize, now: u64) {
        let Some((_, to)) = self.note() else {
            return;
        };
        let Some(running) = &mut self.running else {
            return;
        };
        running.told = running.told.max(to);
        running.sum.resize(d_model, 0.0);
        for row in rows.chunks_exact(d_model.max(1)) {
            for (sum, x) in running.sum.iter_mut().zip(row) {
                *sum += f64::from(*x);
            }
        }
        let n = running.job.prompt.len();
        if to >= n {
            let n_rows = match running.job.embeds {
                Some(Pooling::Last) => 1,
                _ => n,
            };
            let mean = running.sum.iter().map(|sum| (sum / n_rows as f64) as f32);
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

    /// Replaces the sessions, whose state is in doubt.
    pub(crate) fn renew(&mut self, lane: Lane) {
        self.lane = lane;
        self.weak = None;
        self.held.clear();
    }

    fn release(&mut self, why: Ended, now: u64) {
        if let Some(running) = self.running.take() {
            running.clock.ended(why, running.n_drawn);
        }
        self.used = now;
        self.held.truncate(self.lane.session.position());
    }
}

impl Running {
    /// Whether something is wanted of every token of the prompt.
    fn wants_all(&self) -> bool {
        self.job.wants_all()
    }

    /// Scores and draws from the logits of the piece that ends before position `to`; why the job has ended, if so.
    fn take_rows(
        &mut self,
        (rows, weak): (&mut [f32], &[f32]),
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
                    ended = self.draw((row, weak), desk)?;
                }
                None => {}
            }
        }
        if !scores.is_empty() {
            self.teller.tell(Event::Prompt(scores));
        }
        Ok(ended)
    }

    fn draw(
        &mut self,
        (row, weak): (&mut [f32], &[f32]),
        desk: &mut Desk<'_>,
    ) -> Result<Option<Finish>, JobError> {
        if self.job.max_new_tokens == 0 {
            return Ok(Some(Finish::Length));
        }
        if self.job.alternatives.is_some() {
            desk.scratch.clear();
            desk.scratch.extend_from_slice(row);
        }
        if let Some(contrast) = &self.job.contrast {
            contrast.mix(row, weak);
        }
        let Drawn { token, is_last } = self.draw.draw(row)?;
        let is_stop = self.draw.is_stop(token);
        let alternatives = self.job.alternatives;
        let scored = alternatives
            .filter(|_| self.job.scores_prompt || !is_stop)
            .and_then(|n| score(desk.model, desk.scratch, n, token));
        if is_stop {
            if let Some(scored) = scored {
                self.teller.tell(Event::Ending(Box::new(scored)));
            }
            return Ok(Some(Finish::Stop));
        }
        self.teller.tell(Event::Token {
            token,
            scored: scored.map(Box::new),
        });
        self.clock.token();
        self.n_drawn += 1;
        self.text.push(token);
        if is_last {
            return Ok(Some(Finish::Stop));
        }
        Ok((self.n_drawn == self.job.max_new_tokens).then_some(Finish::Length))
    }
}
