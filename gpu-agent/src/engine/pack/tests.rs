//! A pack on the simulated engine: who joins, waits, is refused, and what each hears last.

mod writing;

use super::ending::ENDED;
use super::*;
use crate::engine::simulated::{Simulated, SimulatedRun};
use domain::Timestamp;
use domain::trial::TrialConfig;
use std::cell::Cell;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Receiver;

/// A device on which two trials fit; a disk that refuses trials of seed 13 or [`UNEVALUABLE`] so many times; whether a trial of seed
/// [`TIGHT`], which is out of memory until then, spares some; in how many parts one of seed [`ASKED`] is asked; where in
/// a trace trials were started; what each write of a checkpoint waits for, if a test holds them back; and how many may be on
/// their way.
struct Small(Simulated, u32, Cell<bool>, u32, Vec<Option<String>>, Option<Arc<Mutex<Receiver<()>>>>, usize);

const TIGHT: u64 = 5;
const ASKED: u64 = 7;
/// One that cannot be asked.
const UNASKABLE: u64 = 9;
/// One whose evaluation after its second step fails.
const UNEVALUABLE: u64 = 11;
/// One whose state the device does not give.
const UNREADABLE: u64 = 17;

/// Each look at it is a second later.
#[derive(Default)]
struct Ticking(AtomicU64);

impl Clock for Ticking {
    fn now(&self) -> Timestamp {
        Timestamp(0)
    }

    fn monotonic(&self) -> Duration {
        Duration::from_secs(self.0.fetch_add(1, Ordering::Relaxed))
    }
}

impl Backend for Small {
    type Base = <Simulated as Backend>::Base;
    type Run = SimulatedRun;

    fn base_bytes(&mut self, base: &BaseModel) -> Result<Option<u64>, Failure> {
        Ok((base.model == "huge").then_some(11_000_000_000).or(Some(4_000_000_000)))
    }
    /// A GB for each row of its batches.
    fn fit(&self, _: &Self::Base, run: &mut SimulatedRun, _: u64) -> Option<u64> {
        Some(u64::from(run.config().batch_size) * 1_000_000_000)
    }
    fn spare(&self, _: &Self::Base, run: &mut SimulatedRun) -> bool {
        run.config().seed == TIGHT && !self.2.replace(true)
    }
    fn load(
        &mut self,
        base: &BaseModel,
        admission: &Admission,
        emit: &mut dyn FnMut(Event),
    ) -> Result<(Self::Base, Option<FourBits>), Failure> {
        self.0.load(base, admission, emit)
    }
    fn start(&mut self, base: &Self::Base, admission: &Admission) -> Result<SimulatedRun, Failure> {
        self.4.push(telemetry::trace::Place::current().map(|place| place.to_string()));
        self.0.start(base, admission)
    }
    fn digests(&self, run: &SimulatedRun) -> Digests {
        self.0.digests(run)
    }
    fn step(&self, run: &SimulatedRun) -> u64 {
        self.0.step(run)
    }
    fn total_steps(&self, run: &SimulatedRun) -> u64 {
        self.0.total_steps(run)
    }
    fn base_eval(&mut self, base: &Self::Base, run: &mut SimulatedRun) -> Result<Option<f64>, Failure> {
        self.0.base_eval(base, run)
    }
    fn make_up(&mut self, _: &Self::Base, run: &mut SimulatedRun) -> Option<Stepped> {
        let (step, time, values) = (self.0.step(run), Timestamp(0), Vec::new());
        let point = Some(MetricPoint { step, time, values });
        (run.config().seed == UNEVALUABLE && step == 2).then(|| Stepped { point, ..Stepped::default() })
    }
    fn step_pack(
        &mut self,
        base: &Self::Base,
        runs: &mut [&mut SimulatedRun],
    ) -> Result<Vec<Stepped>, Failure> {
        let tight = |run: &&mut SimulatedRun| run.config().seed == TIGHT;
        if runs.len() > 2 || runs.iter().any(tight) && !self.2.get() {
            return Err(Failure { class: FailureClass::OutOfMemory, message: "too many".into() });
        }
        let mut stepped = self.0.step_pack(base, runs)?;
        for (run, stepped) in runs.iter().zip(&mut stepped) {
            if run.config().seed == UNEVALUABLE && self.0.step(run) == 2 {
                let failed =
                    Failure { class: FailureClass::OutOfMemory, message: "no room to evaluate".into() };
                stepped.failed = Some(failed);
            }
        }
        Ok(stepped)
    }
    fn save(&mut self, run: &mut SimulatedRun, dirs: CheckpointDirs) -> Result<Write, Failure> {
        if run.config().seed == UNREADABLE {
            return Err(Failure { class: FailureClass::Infrastructure, message: "device".into() });
        }
        let refused = [13, UNEVALUABLE].contains(&run.config().seed) && self.1 > 0;
        self.1 -= u32::from(refused);
        let (write, gate) = (self.0.save(run, dirs)?, self.5.clone());
        Ok(Box::new(move || {
            // Nobody who opens it any more has it stand open.
            let _ = gate.map(|gate| gate.lock().unwrap().recv());
            // What a disk refuses it has begun.
            write()?;
            match refused {
                true => Err(Failure { class: FailureClass::Infrastructure, message: "disk".into() }),
                false => Ok(()),
            }
        }))
    }
    fn most_writes(&self) -> usize {
        self.6
    }
    fn ask(&mut self, _: &Self::Base, run: &mut SimulatedRun) -> Result<Asking, Failure> {
        assert_eq!(run.config().total_steps(0), self.0.step(run), "it has made all its steps");
        match run.config().seed {
            ASKED if self.3 > 1 => {
                self.3 -= 1;
                Ok(Asking::More)
            }
            ASKED => Ok(Asking::Over),
            UNASKABLE => Err(Failure { class: FailureClass::User, message: "why".into() }),
            _ => Ok(Asking::Nothing),
        }
    }
    fn summary(&mut self, base: &Self::Base, run: &mut SimulatedRun) -> Result<TrialSummary, Failure> {
        self.0.summary(base, run)
    }
}

fn pack() -> Pack<Small> {
    let clock: Arc<dyn Clock> = Arc::new(Ticking::default());
    let simulated = Simulated::stepping(Duration::ZERO, clock.clone());
    Pack::new(Small(simulated, 2, Cell::new(false), 4, Vec::new(), None, usize::MAX), 10_000_000_000, clock)
}

/// Whether a checkpoint is being written.
fn writes(pack: &Pack<Small>) -> bool {
    pack.writes() > 0
}

/// Whether the disk refused a checkpoint that is still missing.
fn refused(pack: &Pack<Small>) -> bool {
    pack.unsaved.iter().any(|unsaved| unsaved.member.refused)
}

/// Waits until no checkpoint is being written.
fn written(pack: &mut Pack<Small>, emit: &mut dyn FnMut(Event)) {
    while writes(pack) {
        pack.hear_of_writes(Duration::from_secs(60), emit);
    }
}

fn admission(dir: &Path, name: &str, base: &str, seed: u64) -> Admission {
    let config =
        TrialConfig { pretrained_model_id: base.into(), max_steps: Some(3), seed, ..TrialConfig::default() };
    let (assignment, places, work_dir) = (Assignment::new(name, 1), Default::default(), dir.join(name));
    let (evaluations, belongs, cache) = (None, None, None);
    Admission {
        assignment,
        config,
        resume: None,
        digests: None,
        evaluations,
        places,
        cache,
        work_dir,
        belongs,
    }
}

/// Steps until everything is done: the trials' last words and the bases, in order.
fn run(pack: &mut Pack<Small>) -> Vec<String> {
    let mut heard = Vec::new();
    while !pack.is_idle() {
        pack.step(&mut |event| match event {
            Event::BaseResident(base) => heard.push(format!("base {}", base.unwrap_or_default())),
            Event::Trial(a, Happening::Finished { ending, .. }) => {
                heard.push(format!("{} {ending:?}", a.trial));
            }
            Event::Trial(a, Happening::Failed(f)) => heard.push(format!("{} {}", a.trial, f.message)),
            Event::Trial(a, Happening::Released) => heard.push(format!("{} released", a.trial)),
            Event::Trial(a, Happening::Note(severity, what)) => {
                heard.push(format!("{} {severity:?}: {what}", a.trial));
            }
            Event::Trial(..) | Event::Phase(..) | Event::Steps(_) | Event::Quantised { .. } => {}
        });
    }
    heard
}

#[test]
fn one_too_many_goes_and_a_full_disk_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let mut pack = pack();
    for (name, seed) in [("one", 13), ("two", 1), ("three", 1)] {
        pack.admit(admission(dir.path(), name, "a", seed));
    }
    // The other does not wait for it, and it is told of once.
    let refused = "one Error: no checkpoint can be written; it waits: disk";
    assert_eq!(run(&mut pack), ["base a", "three too many", refused, "two Completed", "one Completed"]);
}

/// A device knows uploaded data by its name, and reads it where it lies.
#[test]
fn uploaded_data_keeps_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let mut pack = pack();
    for (name, place) in [("one", "here"), ("two", "huge")] {
        let mut admission = admission(dir.path(), name, &format!("blob:{name}"), 1);
        admission.places.insert(format!("blob:{name}"), place.into());
        assert_eq!(admission.placed().pretrained_model_id, place);
        pack.admit(admission);
    }
    let heard = run(&mut pack);
    assert_eq!(heard[..3], ["base blob:one", "one Completed", "base "]);
    assert!(heard[3].starts_with("two does not fit"), "{heard:?}");
}

/// Out of memory once, it goes on with less; a second time there is nothing left to spare.
#[test]
fn out_of_memory_is_tried_again_with_less() {
    let dir = tempfile::tempdir().unwrap();
    let mut pack = pack();
    for (name, seed) in [("one", 1), ("two", TIGHT)] {
        pack.admit(admission(dir.path(), name, "a", seed));
    }
    let spared = |name| format!("{name} Warning: layers are computed again from here on: too many");
    let want = ["base a".into(), spared("two"), "one Completed".into(), "two Completed".into()];
    assert_eq!(run(&mut pack), want);
    pack.backend.2.set(false);
    for (name, seed) in [("three", TIGHT), ("four", 1), ("five", 1)] {
        pack.admit(admission(dir.path(), name, "a", seed));
    }
    let want = [spared("three"), "five too many".into(), "three Completed".into(), "four Completed".into()];
    assert_eq!(run(&mut pack), want);
}

/// The step is made, and what fails after it is one trial's.
#[test]
fn an_evaluation_that_fails_ends_its_trial_alone() {
    let dir = tempfile::tempdir().unwrap();
    let mut pack = pack();
    for (name, seed) in [("one", UNEVALUABLE), ("two", 1)] {
        pack.admit(admission(dir.path(), name, "a", seed));
    }
    assert_eq!(run(&mut pack), ["base a", "one no room to evaluate", "two Completed"]);
}

/// A disk gets room again; a device that is asked again for a state that it does not give would be for ever.
#[test]
fn a_state_that_cannot_be_taken_ends_its_trial_alone() {
    let dir = tempfile::tempdir().unwrap();
    let mut pack = pack();
    for (name, seed) in [("one", UNREADABLE), ("two", 1)] {
        pack.admit(admission(dir.path(), name, "a", seed));
    }
    assert_eq!(run(&mut pack), ["base a", "one device", "two Completed"]);
}

/// What is logged while a trial joins, a download for one, is in its trace.
#[test]
fn a_trial_joins_at_its_place_in_its_trace() {
    let dir = tempfile::tempdir().unwrap();
    let mut pack = pack();
    let place = telemetry::trace::TrialTrace::of("a", 1).attempt(1).to_string();
    for (name, belongs) in [("one", Some(place.clone())), ("two", None)] {
        pack.admit(Admission { belongs, ..admission(dir.path(), name, "a", 1) });
    }
    run(&mut pack);
    assert_eq!(pack.backend.4, [Some(place), None]);
}

#[test]
fn what_waits_for_the_disk_can_be_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let mut pack = pack();
    pack.backend.1 = u32::MAX;
    pack.admit(admission(dir.path(), "one", "a", 13));
    while !refused(&pack) {
        pack.step(&mut |_| {});
    }
    pack.stop(&Assignment::new("one", 1), How::Stop);
    pack.step(&mut |event| panic!("its last checkpoint is still missing: {event:?}"));
    assert!(!pack.is_idle());
    pack.stop(&Assignment::new("one", 1), How::Drop);
    assert_eq!(run(&mut pack), Vec::<String>::new());
}

/// A trial that is trained is asked a little at a time, while the others go on; its base stays for as long.
#[test]
fn trials_are_asked_between_the_steps_of_others() {
    let dir = tempfile::tempdir().unwrap();
    let mut pack = pack();
    let mut other = admission(dir.path(), "other", "a", 1);
    other.config.max_steps = Some(20);
    other.config.logging_steps = 1;
    pack.admit(admission(dir.path(), "asked", "a", ASKED));
    pack.admit(other);
    let mut heard = Vec::new();
    let mut hear = |event| match event {
        Event::Trial(a, Happening::Points(points)) if a.trial.as_str() == "other" => {
            heard.push(format!("step {}", points[0].step));
        }
        Event::Trial(a, Happening::Checkpoint(_)) => heard.push(format!("{} saved", a.trial)),
        Event::Trial(a, Happening::Finished { .. }) => heard.push(format!("{} over", a.trial)),
        Event::Phase(a, Phase { work: Work::Evaluate, step: 3, .. }) => {
            heard.push(format!("{} was asked", a.trial));
        }
        _ => {}
    };
    while !pack.is_idle() {
        pack.step(&mut hear);
        // Else the other one may have made all its steps before the disk has the checkpoint.
        written(&mut pack, &mut hear);
    }
    // Its held-out rows are evaluated at its last step as well.
    let at = |what: &str| {
        heard.iter().rposition(|heard| heard == what).unwrap_or_else(|| panic!("{what}: {heard:?}"))
    };
    let (saved, asked, over) = (at("asked saved"), at("asked was asked"), at("asked over"));
    assert!(saved < asked && asked + 1 == over, "its adapter is safe before it is asked: {heard:?}");
    let steps = heard[saved..over].iter().filter(|heard| heard.starts_with("step")).count();
    assert!((2..=4).contains(&steps), "{heard:?}");
    assert!(over < at("other over"));

    pack.backend.3 = 4;
    for (name, base, seed) in [("one", "a", ASKED), ("two", "b", 1)] {
        pack.admit(admission(dir.path(), name, base, seed));
    }
    assert_eq!(run(&mut pack), ["one Completed", "base ", "base b", "two Completed"]);
}

#[test]
fn what_is_asked_can_be_ended() {
    let dir = tempfile::tempdir().unwrap();
    for (how, wanted) in
        [(How::Stop, vec!["one Completed"]), (How::Release, vec!["one released"]), (How::Drop, vec![])]
    {
        let mut pack = pack();
        pack.backend.3 = u32::MAX;
        pack.admit(admission(dir.path(), "one", "a", ASKED));
        while pack.candidates.is_empty() {
            pack.step(&mut |_| {});
        }
        pack.stop(&Assignment::new("one", 1), how);
        assert_eq!(run(&mut pack), wanted);
    }
}

/// It is trained all the same, and says why it was not asked.
#[test]
fn a_trial_that_is_not_asked_is_none_the_less_trained() {
    let dir = tempfile::tempdir().unwrap();
    let why = |pack: &mut Pack<Small>| {
        let mut why = None;
        while !pack.is_idle() {
            pack.step(&mut |event| {
                if let Event::Trial(_, Happening::Finished { ending, summary, .. }) = event {
                    assert_eq!((ending, summary.steps), (Ending::Completed, 3));
                    why = Some(summary.unasked);
                }
            });
        }
        why.unwrap()
    };
    let mut pack = pack();
    pack.admit(admission(dir.path(), "one", "a", UNASKABLE));
    assert_eq!(why(&mut pack).as_deref(), Some("why"));
    pack.admit(admission(dir.path(), "two", "a", ASKED));
    assert_eq!(why(&mut pack), None);
    // It waits for the disk when it is told to end.
    pack.backend.1 = u32::MAX;
    pack.admit(admission(dir.path(), "three", "a", 13));
    while !refused(&pack) {
        pack.step(&mut |_| {});
    }
    pack.stop(&Assignment::new("three", 1), How::Stop);
    pack.step(&mut |event| panic!("its last checkpoint is still missing: {event:?}"));
    pack.backend.1 = 0;
    assert_eq!(why(&mut pack).as_deref(), Some(ENDED));
}

#[test]
fn another_base_waits_and_is_not_passed_by() {
    let dir = tempfile::tempdir().unwrap();
    let mut pack = pack();
    for (name, base) in [("one", "a"), ("two", "b"), ("three", "a")] {
        pack.admit(admission(dir.path(), name, base, 1));
    }
    let wanted = ["base a", "one Completed", "base ", "base b", "two Completed"];
    let heard = run(&mut pack);
    assert_eq!(heard[..5], wanted);
    assert_eq!(heard[5..], ["base ", "base a", "three Completed"]);
}

fn sized(dir: &Path, name: &str, base: &str, batch_size: u32) -> Admission {
    let mut admission = admission(dir, name, base, 1);
    admission.config.batch_size = batch_size;
    admission
}

/// The device has 10 GB, of which a base takes 4.
#[test]
fn memory_is_decided_before_it_is_spent() {
    let dir = tempfile::tempdir().unwrap();
    /// Trials as (name, base, batch size), and what is heard.
    type Case<'a> = (&'a [(&'a str, &'a str, u32)], &'a [&'a str]);
    let cases: [Case; 4] = [
        (&[("one", "a", 2), ("two", "a", 4)], &["base a", "one Completed", "two Completed"]),
        // It waits for the first to end, and is not passed by.
        (
            &[("one", "a", 4), ("two", "a", 3), ("three", "a", 1)],
            &["base a", "one Completed", "two Completed", "three Completed"],
        ),
        (
            &[("one", "a", 7), ("two", "a", 1)],
            &[
                "base a",
                "one does not fit: needs 11.000 GB (4.000 GB base, 7.000 GB its own), device has 10.000; lower \
                 batch_size or max_sequence_length, or take a smaller base",
                "two Completed",
            ],
        ),
        (
            &[("one", "huge", 1)],
            &[
                "one does not fit: needs 11.000 GB (11.000 GB base, 0.000 GB its own), device has 10.000; lower \
               batch_size or max_sequence_length, or take a smaller base",
            ],
        ),
    ];
    for (trials, wanted) in cases {
        let mut pack = pack();
        for (name, base, batch_size) in trials {
            pack.admit(sized(dir.path(), name, base, *batch_size));
        }
        assert_eq!(run(&mut pack), wanted, "{trials:?}");
    }
}

#[test]
fn what_waits_can_be_ended() {
    let dir = tempfile::tempdir().unwrap();
    for (how, wanted) in [
        (How::Stop, vec!["base a", "two Stopped", "one Completed"]),
        (How::Release, vec!["base a", "two released", "one Completed"]),
        (How::Drop, vec!["base a", "one Completed"]),
    ] {
        let mut pack = pack();
        pack.admit(admission(dir.path(), "one", "a", 1));
        pack.admit(admission(dir.path(), "two", "b", 1));
        let mut heard = Vec::new();
        pack.step(&mut |event| {
            if let Event::BaseResident(Some(base)) = event {
                heard.push(format!("base {base}"));
            }
        });
        pack.stop(&Assignment::new("two", 1), how);
        pack.stop(&Assignment::new("nobody", 1), how);
        heard.extend(run(&mut pack));
        assert_eq!(heard, wanted);
    }
}

#[test]
fn steps_are_told_of_together_and_none_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let mut pack = pack();
    // Each takes a second by this clock.
    let mut admission = admission(dir.path(), "one", "a", 1);
    admission.config.max_steps = Some(25);
    admission.config.logging_steps = 1;
    pack.admit(admission);
    let (mut told, mut points) = (Vec::new(), 0);
    while !pack.is_idle() {
        pack.step(&mut |event| match event {
            Event::Steps(seconds) => told.push(seconds.len()),
            Event::Trial(_, Happening::Points(_)) => points += 1,
            _ => {}
        });
    }
    assert_eq!(told.iter().sum::<usize>(), 25);
    assert!(told.len() < 5, "{told:?}");
    assert!(points > 20, "{points}");
}
