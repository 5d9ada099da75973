use super::super::super::made::{self, float16, four_bit};
use super::*;

fn shown(trials: &[domain::trial::Trial]) -> Vec<(String, String, Vec<Vec<String>>)> {
    let facts = Facts::of(trials);
    let rows = |figure: &Figure| {
        let rows = figure.data.as_ref().map_or(&[][..], |table| &table.rows);
        rows.iter().map(|row| row.cells.iter().map(Line::plain).collect()).collect()
    };
    figures(&facts, None).iter().map(|f| (f.name.clone(), f.caption.plain(), rows(f))).collect()
}

#[test]
fn a_parameter_with_one_value_has_no_figure() {
    let trials = [made::measured(1, four_bit(2, 16, 512), 7.0, 3.0)];
    assert!(shown(&trials).is_empty());
    assert!(shown(&[]).is_empty());
}

#[test]
fn the_published_figures_with_what_does_not_fit() {
    let trials = [
        made::measured(1, float16(1, 16, 512), 20.0, 4.0),
        made::measured(2, float16(2, 16, 512), 28.0, 5.0),
        made::unfit(3, float16(4, 16, 512), 45.0),
        made::measured(4, four_bit(1, 16, 512), 6.0, 2.0),
        made::measured(5, four_bit(2, 16, 512), 7.0, 3.0),
        made::measured(6, four_bit(2, 64, 512), 8.0, 2.5),
        made::measured(7, four_bit(2, 16, 1024), 9.0, 1.5),
    ];
    let shown = shown(&trials);
    let names: Vec<_> = shown.iter().map(|(name, ..)| name.as_str()).collect();
    assert_eq!(
        names,
        [
            "peak-memory-by-batch-size",
            "peak-memory-by-lora-rank",
            "peak-memory-by-max-sequence-length",
            "speed-by-lora-rank",
            "speed-by-max-sequence-length",
            "cost-of-a-run-by-precision-mode",
        ]
    );
    let (_, caption, rows) = &shown[0];
    assert_eq!(
        caption,
        "Peak memory by batch size. Held: lora_rank 16, max_sequence_length 512; each trial alone on its device. ×: \
         does not fit."
    );
    assert_eq!(rows[4], ["4", "float16", "does not fit: needs 45 GB", "–"]);
    assert_eq!(rows[2], ["2", "4bit", "7 GB", "1"]);
    assert_eq!(rows.len(), 5);
}

/// The published report's two devices in one: a line for each of both.
#[test]
fn each_accelerator_has_lines_of_its_own() {
    let on = |accelerator: &str, gigabytes: f64, mut trial: domain::trial::Trial| {
        trial.device = Some(made::device(accelerator, gigabytes, 2.86));
        trial
    };
    let v100 = |trial| on("V100-16GB", 15.5, trial);
    let trials = [
        made::measured(1, float16(1, 16, 512), 20.0, 4.0),
        made::measured(2, float16(2, 16, 512), 28.0, 5.0),
        made::measured(3, four_bit(2, 16, 512), 7.0, 3.0),
        v100(made::unfit(4, float16(1, 16, 512), 20.0)),
        v100(made::measured(5, four_bit(1, 16, 512), 6.0, 1.0)),
        v100(made::measured(6, four_bit(2, 16, 512), 7.0, 1.5)),
        v100(made::measured(7, four_bit(2, 64, 512), 8.0, 1.2)),
    ];
    let shown = shown(&trials);
    let rows = |name: &str| -> Vec<String> {
        let (.., rows) = shown.iter().find(|(known, ..)| known == name).unwrap();
        rows.iter().map(|row| row.join(" | ")).collect()
    };
    assert_eq!(
        rows("peak-memory-by-batch-size"),
        [
            "1 | 4bit, V100-16GB | 6 GB | 1",
            "1 | float16, A100-40GB | 20 GB | 1",
            "1 | float16, V100-16GB | does not fit: needs 20 GB | –",
            "2 | 4bit, A100-40GB | 7 GB | 1",
            "2 | 4bit, V100-16GB | 7 GB | 1",
            "2 | float16, A100-40GB | 28 GB | 1",
        ]
    );
    let speeds = rows("speed-by-lora-rank");
    assert_eq!(speeds[1], "16 | 4bit, V100-16GB | 1.5 rows/s | 1", "{speeds:#?}");
    assert_eq!(rows("cost-of-a-run-by-accelerator").len(), 3);
    let figures = figures(&Facts::of(&trials), None);
    let levels = figures[0].chart.marks.iter().filter(|mark| matches!(mark, Mark::Level { .. }));
    assert_eq!(levels.count(), 2, "the memory of each");
    assert!(figures[0].description.ends_with("a line for each precision mode, accelerator"));
}

#[test]
fn what_is_computed_again_has_a_line_of_its_own() {
    use domain::trial::GradientCheckpointing::{Off, On};
    let mut trials = Vec::new();
    for (number, (batch, again, gigabytes)) in (1..).zip([(1, Off, 6.0), (2, Off, 7.0), (1, On, 4.0)]) {
        let mut trial = made::measured(number, four_bit(batch, 16, 512), gigabytes, 1.0);
        trial.config.gradient_checkpointing = again;
        trials.push(trial);
    }
    let (_, caption, rows) = &shown(&trials)[0];
    assert!(caption.contains("No other parameter that moves it differs"), "{caption}");
    assert_eq!(rows[1], ["1", "4bit, recomputed", "4 GB", "1"]);
    assert_eq!(rows.len(), 3);
}

#[test]
fn what_was_packed_is_not_beside_what_was_solo() {
    let mut trials = vec![
        made::measured(1, four_bit(1, 16, 512), 6.0, 2.0),
        made::measured(2, four_bit(2, 16, 512), 7.0, 3.0),
        made::packed(3, four_bit(4, 16, 512), 3.0, 1.0),
    ];
    assert_eq!(shown(&trials)[0].2.len(), 2);
    trials.remove(0);
    let (_, caption, rows) = &shown(&trials)[0];
    assert!(caption.contains("packed") && rows.len() == 2, "{caption}");
}

#[test]
fn the_cost_of_runs_that_ended_on_each_accelerator() {
    let mut trials = vec![
        made::measured(1, float16(2, 16, 512), 28.0, 5.0),
        made::measured(2, four_bit(2, 16, 512), 7.0, 3.0),
        made::measured(3, four_bit(2, 16, 512), 7.0, 1.0),
        made::unfit(4, float16(2, 16, 512), 28.0),
    ];
    for trial in &mut trials[2..] {
        trial.device = Some(made::device("V100-16GB", 16.0, 2.86));
    }
    trials[2].cost_usd = Some(6.75);
    let shown = shown(&trials);
    let (name, _, rows) = shown.last().unwrap();
    assert_eq!((name.as_str(), rows.len()), ("cost-of-a-run-by-accelerator", 4));
    assert_eq!(rows[2], ["V100-16GB", "4bit", "$6.75", "1"]);
    assert_eq!(rows[3], ["V100-16GB", "float16", "does not fit: needs 28 GB", "–"]);
    assert_eq!(shown.len(), 1, "no other parameter has two values");
}

/// What a run costs is told of the configuration that the other figures hold, even where another has more numbers.
#[test]
fn the_cost_is_of_what_the_others_hold() {
    let v100 = |mut trial: domain::trial::Trial| {
        trial.device = Some(made::device("V100-16GB", 15.5, 2.86));
        trial
    };
    let trials = [
        made::measured(1, float16(2, 16, 512), 28.0, 5.0),
        made::measured(2, four_bit(2, 16, 512), 7.0, 3.0),
        v100(made::unfit(3, float16(2, 16, 512), 28.0)),
        v100(made::measured(4, four_bit(2, 16, 512), 7.0, 1.0)),
        made::measured(5, float16(2, 64, 512), 29.0, 4.0),
        made::measured(6, four_bit(2, 64, 512), 8.0, 2.5),
        made::measured(7, float16(1, 16, 512), 12.0, 4.0),
        made::measured(8, four_bit(1, 16, 512), 5.0, 2.0),
        v100(made::measured(9, float16(1, 16, 512), 12.0, 2.0)),
        v100(made::measured(10, four_bit(1, 16, 512), 5.0, 1.0)),
    ];
    let shown = shown(&trials);
    let (name, caption, rows) = shown.last().unwrap();
    assert_eq!(name, "cost-of-a-run-by-accelerator");
    assert!(caption.contains("batch_size 2") && caption.contains("×: does not fit"), "{caption}");
    assert_eq!(rows[3], ["V100-16GB", "float16", "does not fit: needs 28 GB", "–"]);
}

/// What does not fit stands above all that was measured and the memory of every device, a row a line; published numbers
/// are rings where a trial has their place.
#[test]
fn what_does_not_fit_and_what_was_published_have_their_places() {
    let trials = [
        made::measured(1, float16(1, 16, 512), 20.0, 4.0),
        made::measured(2, float16(2, 16, 512), 28.0, 5.0),
        made::unfit(3, float16(4, 16, 512), 45.0),
        made::measured(4, four_bit(2, 16, 512), 7.0, 3.0),
        made::unfit(5, four_bit(4, 16, 512), 43.0),
    ];
    let figures = figures(&Facts::of(&trials), config::published::openllama_7b());
    let marks = &figures[0].chart.marks;
    let heights = marks.iter().filter_map(|mark| match mark {
        Mark::Cross { y, .. } => Some(*y),
        _ => None,
    });
    let heights: Vec<_> = heights.collect();
    assert!(
        heights.len() == 2 && heights[0] != heights[1] && heights.iter().all(|y| *y > 41.9),
        "{heights:?}"
    );
    let rings = marks.iter().filter_map(|mark| match mark {
        Mark::Dot { x, y, full: false, .. } => Some((*x, *y)),
        _ => None,
    });
    let rings: Vec<_> = rings.map(|(x, y)| (x, (100.0 * y).round() / 100.0)).collect();
    assert_eq!(rings, [(2.0, 28.2), (2.0, 7.57)]);
    assert!(figures[0].caption.plain().contains("Grey rings"), "{}", figures[0].caption.plain());
    assert!(figures[0].chart.draw(false).is_ok());
}
