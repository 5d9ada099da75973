//! What a process that hosts an engine does: the engine steps on a thread as it would in the agent, and lines are passed
//! on, from standard input to it and from it to standard output. Nothing else may write to standard output.
//!
//! It ends with its input, so that it does not outlive its agent. It does not heed Ctrl-C and SIGTERM, which service
//! managers send to every process of an agent: the agent has it write checkpoints first.

use super::candle::Candle;
use super::host::Host;
use super::lines;
use super::pack::Pack;
use super::{Command, Event, Happening};
use domain::SystemClock;
use domain::trial::FailureClass;
use std::io::{self, BufRead, Write};
use std::sync::Arc;
use tokio::sync::mpsc;
use trainer::TrainError;

/// Why such a process ends other than as it is told to.
#[derive(Debug, thiserror::Error)]
pub enum ChildError {
    /// The device cannot be used.
    #[error(transparent)]
    Device(#[from] TrainError),
    /// The device was lost: nothing that runs on it any more succeeds, in this process.
    #[error("the device is lost: {0}")]
    Lost(TrainError),
    /// A pipe or the system failed.
    #[error("an engine process: {0}")]
    Io(#[from] io::Error),
}

/// Hosts the engine of a device until it is told to end. With the name of its accelerator, if that is known.
///
/// # Errors
/// See [`ChildError`].
pub fn serve(device: &str, memory_bytes: u64, accelerator: Option<&str>) -> Result<(), ChildError> {
    heed_no_signals()?;
    let device = trainer::device::open(device)?;
    let (opened, accelerator) = (device.clone(), accelerator.unwrap_or_default().to_string());
    let factory = move || -> Box<dyn super::Engine> {
        let clock = Arc::new(SystemClock::new());
        let candle = Candle::new(opened.clone(), clock.clone()).on(&accelerator);
        Box::new(Pack::new(candle, memory_bytes, clock))
    };
    let Host { commands, events } = Host::start("engine", Box::new(factory))?;
    // Whichever ends first ends the process: its input, or the engine.
    let (done, ended) = std::sync::mpsc::channel();
    let input_ended = done.clone();
    std::thread::Builder::new().name("commands".into()).spawn(move || {
        if let Some(end) = listen(io::stdin().lock(), &commands) {
            let _ = input_ended.send(end.map_err(ChildError::from));
        }
    })?;
    std::thread::Builder::new().name("events".into()).spawn(move || {
        let _ = done.send(say(events, || Ok(device.synchronize()?), io::stdout().lock()));
    })?;
    ended.recv().unwrap_or_else(|_| Err(io::Error::other("the engine's thread has ended").into()))
}

/// Has the process heed no signal by which a person or a service manager ends the agent.
fn heed_no_signals() -> io::Result<()> {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let _within = runtime.enter();
        // A handler that is installed stays so, also when nobody listens.
        for kind in [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()] {
            let _ = signal(kind)?;
        }
    }
    Ok(())
}

/// Passes commands on until the pipe ends, and with it whoever wrote to it. `None` if the engine ends first.
fn listen(input: impl BufRead, commands: &mpsc::Sender<Command>) -> Option<io::Result<()>> {
    for line in input.split(b'\n') {
        let command = match line.and_then(|line| lines::decode::<Command>(&line).map_err(io::Error::from)) {
            Ok(command) => command,
            Err(error) => return Some(Err(error)),
        };
        if let Command::Log(directives) = &command {
            if let Err(error) = telemetry::log::change(directives) {
                tracing::warn!(error, "what is logged is not changed");
            }
            continue;
        }
        if commands.blocking_send(command).is_err() {
            return None;
        }
    }
    Some(Ok(()))
}

/// Passes events on until the engine ends. `alive` waits for the device, or says why it cannot.
fn say(
    mut events: mpsc::Receiver<Event>,
    alive: impl Fn() -> Result<(), TrainError>,
    mut output: impl Write,
) -> Result<(), ChildError> {
    while let Some(event) = events.blocking_recv() {
        let failed = matches!(&event, Event::Trial(_, Happening::Failed(failure))
            if failure.class == FailureClass::Infrastructure);
        if failed {
            // A GPU that fell off its bus, or that ran into an illegal address, fails every trial from now on, and only
            // a new process can use it again. That trial and the others go back with this one's end.
            alive().map_err(ChildError::Lost)?;
        }
        output.write_all(&lines::encode(&event).map_err(io::Error::from)?)?;
        output.flush()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Assignment;
    use domain::trial::Failure;

    #[test]
    fn commands_are_passed_on_until_the_pipe_ends() {
        let stop = Command::Stop(Assignment::new("a", 1), super::super::How::Stop);
        let (sender, mut receiver) = mpsc::channel(4);
        let input = lines::encode(&stop).unwrap();
        listen(&input[..], &sender).unwrap().unwrap();
        assert_eq!(receiver.blocking_recv(), Some(stop));
        let error = listen(&b"ls -l\n"[..], &sender).unwrap().unwrap_err();
        assert!(error.to_string().contains("ls -l"), "{error}");
        drop(receiver);
        assert!(listen(&input[..], &sender).is_none());
    }

    #[test]
    fn a_lost_device_ends_the_process_before_its_failures_are_told() {
        let failed = |trial: &str, class| {
            let failure = Failure { class, message: "an illegal address".into() };
            Event::Trial(Assignment::new(trial, 1), Happening::Failed(failure))
        };
        let events = [
            Event::Trial(Assignment::new("a", 1), Happening::Released),
            // Its own fault: the device is not asked.
            failed("b", FailureClass::OutOfMemory),
            failed("c", FailureClass::Infrastructure),
            Event::Trial(Assignment::new("d", 1), Happening::Released),
        ];
        // (whether the device still answers, how many of them are told)
        for (answers, told) in [(true, 4), (false, 2)] {
            let (sender, receiver) = mpsc::channel(events.len());
            events.iter().for_each(|event| sender.try_send(event.clone()).unwrap());
            drop(sender);
            let lost = || TrainError::Io { path: "the bus".into(), source: io::Error::other("fallen off") };
            let alive = || if answers { Ok(()) } else { Err(lost()) };
            let mut output = Vec::new();
            let ended = say(receiver, alive, &mut output);
            assert_eq!(matches!(ended, Err(ChildError::Lost(_))), !answers, "{ended:?}");
            let lines = output.split_inclusive(|byte| *byte == b'\n');
            let said: Vec<Event> = lines.map(|line| lines::decode(line).unwrap()).collect();
            assert_eq!(said, events[..told]);
        }
    }
}
