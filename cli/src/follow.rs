//! Following a sweep to its end, over restarts of its server.

use crate::board::{Board, Change};
use crate::client::{Connection, ServerArgs};
use crate::output::say;
use crate::progress::Progress;
use crate::{Failure, agents, sweeps};
use domain::fleet::Feature;
use proto::v1;
use std::time::Duration;
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// Time between two looks at the clock while a sweep is followed.
const TICK: Duration = Duration::from_secs(1);

/// Time between two looks for an agent that a sweep lacks.
const LOOK: Duration = Duration::from_secs(30);

/// The first and the longest pause between two attempts to reach a server again.
const PAUSES: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// How a sweep is followed.
pub(crate) struct Follow<'a> {
    /// The way to its server.
    pub(crate) server: &'a ServerArgs,
    /// The sweep.
    pub(crate) sweep: &'a str,
    /// Whether to show nothing.
    pub(crate) quiet: bool,
    /// How long a server that is gone is looked for.
    pub(crate) reconnect_for: Duration,
}

/// What a sweep came to, and the connection to its server if another had to be made.
pub(crate) struct Followed {
    pub(crate) board: Board,
    pub(crate) connection: Option<Connection>,
}

/// Who else hears of a sweep that is followed.
pub(crate) trait Listener {
    /// The board took a change in.
    fn hear(&mut self, board: &Board, change: &Change);

    /// Does what takes time. Asked every second, and once more when the sweep is over; the stream waits meanwhile.
    ///
    /// # Errors
    /// The server is gone, after which this is asked again over another connection; or it cannot be done.
    async fn catch_up(&mut self, connection: &Connection, board: &Board) -> Result<(), Cut>;
}

/// Nobody else.
struct Nobody;

impl Listener for Nobody {
    fn hear(&mut self, _: &Board, _: &Change) {}

    async fn catch_up(&mut self, _: &Connection, _: &Board) -> Result<(), Cut> {
        Ok(())
    }
}

/// Why a stream ended before the sweep was over.
pub(crate) enum Cut {
    /// The server is gone.
    Gone(Status),
    /// Something else is wrong.
    Failed(Failure),
}

impl From<Failure> for Cut {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl From<Status> for Cut {
    fn from(status: Status) -> Self {
        // A connection that breaks makes a status of its own, without the details that the server's have.
        let broken = status.get_error_details().error_info().is_none();
        if broken || status.code() == Code::Unavailable {
            Self::Gone(status)
        } else {
            Self::Failed(status.into())
        }
    }
}

impl Follow<'_> {
    /// Follows the sweep to its end.
    ///
    /// # Errors
    /// There is no such sweep; its server is gone and does not come back in time.
    pub(crate) async fn to_the_end(&self, connection: &Connection) -> Result<Followed, Failure> {
        self.with(connection, &mut Nobody).await
    }

    /// Follows the sweep to its end together with somebody else.
    ///
    /// # Errors
    /// The same, and those of the listener.
    pub(crate) async fn with(
        &self,
        connection: &Connection,
        listener: &mut impl Listener,
    ) -> Result<Followed, Failure> {
        let lacks = lacks(connection, self.sweep).await?;
        let mut board = Board::new(older(connection, self.sweep).await?, lacks);
        let mut progress = Progress::new(self.quiet);
        let mut replaced: Option<Connection> = None;
        loop {
            let current = replaced.as_ref().unwrap_or(connection);
            match self.stream(current, &mut board, &mut progress, listener).await {
                Ok(()) => break,
                Err(Cut::Gone(status)) => {
                    let again = self.reconnect(&progress, status.into()).await?;
                    self.look(&again, &mut board).await;
                    replaced = Some(again);
                }
                Err(Cut::Failed(failure)) => return Err(failure),
            }
        }
        let elapsed = progress.elapsed();
        progress.finish();
        if !self.quiet {
            say!("{}", board.sweep_line(elapsed));
        }
        Ok(Followed { board, connection: replaced })
    }

    /// A picture of the sweep, and every change until it is over.
    async fn stream(
        &self,
        connection: &Connection,
        board: &mut Board,
        progress: &mut Progress,
        listener: &mut impl Listener,
    ) -> Result<(), Cut> {
        let request = v1::WatchSweepRequest { sweep_id: self.sweep.to_string() };
        let mut stream = connection.sweeps().watch_sweep(request).await?.into_inner();
        let mut tick = tokio::time::interval(TICK);
        // What a listener took too long for is not made up for.
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut looked = progress.elapsed();
        // The server ends the stream once the sweep is over and every trial was told.
        loop {
            tokio::select! {
                message = stream.message() => {
                    let Some(message) = message? else { break };
                    let change = board.apply(message, progress.elapsed())?;
                    progress.show(board, &change);
                    listener.hear(board, &change);
                }
                _ = tick.tick() => {
                    if !board.has_trained() && progress.elapsed() - looked >= LOOK.as_secs_f64() {
                        self.look(connection, board).await;
                        looked = progress.elapsed();
                    }
                    progress.tick(board);
                    listener.catch_up(connection, board).await?;
                }
            }
        }
        match board.is_over() {
            true => listener.catch_up(connection, board).await,
            false => Err(Cut::Gone(Status::unavailable("it ended the stream before the sweep was over"))),
        }
    }

    /// Sees whether an agent that the sweep lacked is there by now, or is not any more. That the server is gone the stream says.
    async fn look(&self, connection: &Connection, board: &mut Board) {
        if let Ok(lacks) = lacks(connection, self.sweep).await {
            board.lacks = lacks;
        }
    }

    /// Looks for the server until it is there again; `gone` is what is said if it is not.
    async fn reconnect(&self, progress: &Progress, gone: Failure) -> Result<Connection, Failure> {
        let until = progress.elapsed() + self.reconnect_for.as_secs_f64();
        if self.reconnect_for.is_zero() {
            return Err(gone);
        }
        say!("the server is gone; waiting for it to come back (Ctrl-C ends that)");
        let mut pause = PAUSES.0;
        while progress.elapsed() < until {
            tokio::time::sleep(pause).await;
            pause = (2 * pause).min(PAUSES.1);
            if let Some(connection) = Connection::again(self.server).await {
                say!("the server is back; going on");
                return Ok(connection);
            }
        }
        Err(gone)
    }
}

/// Unfinished sweeps that were submitted before a sweep: devices go to the trials that wait longest.
async fn older(connection: &Connection, sweep_id: &str) -> Result<Vec<String>, Failure> {
    let running = sweeps::list(connection, vec![v1::SweepState::Running]).await?;
    // Newest first.
    Ok(running.into_iter().map(|s| s.id).skip_while(|id| id != sweep_id).skip(1).collect())
}

/// What a sweep needs and none of the agents has that are there: nothing goes to one that would leave its evaluations out.
async fn lacks(connection: &Connection, sweep_id: &str) -> Result<Option<&'static str>, Failure> {
    let spec = sweeps::get(connection, sweep_id).await?.spec.unwrap_or_default();
    if !spec.fields.contains_key("evaluations") {
        return Ok(None);
    }
    let mut agents = agents::list(connection).await?;
    agents.retain(|agent| agent.connected);
    let evaluates = |agent: &v1::Agent| Feature::known(&agent.understands).contains(&Feature::Evaluations);
    let lacks = !agents.is_empty() && !agents.iter().any(evaluates);
    Ok(lacks.then_some("an agent of a version that asks evaluations, as none that is there does"))
}

/// A time on the command line: `10m`, `1h30m`, `90s` or seconds.
///
/// # Errors
/// It is none.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is no time; write 10m, 1h30m, 90s or seconds");
    let mut total = 0.0;
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(rest.len());
        let amount: f64 = rest[..end].parse().map_err(|_| wrong())?;
        let (unit, length) = match rest[end..].chars().next() {
            None | Some('s') => (1.0, 1),
            Some('m') => (60.0, 1),
            Some('h') => (3600.0, 1),
            Some(_) => return Err(wrong()),
        };
        total += amount * unit;
        rest = rest.get(end + length..).unwrap_or_default();
    }
    Duration::try_from_secs_f64(total).ok().filter(|_| !text.is_empty()).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        for (text, want) in [
            ("10m", Some(600)),
            ("1h30m", Some(5400)),
            ("90s", Some(90)),
            ("90", Some(90)),
            ("0", Some(0)),
            ("", None),
            ("m", None),
            ("-1m", None),
            ("5x", None),
            ("1e300h", None),
        ] {
            assert_eq!(duration(text).ok(), want.map(Duration::from_secs), "{text}");
        }
    }
}
