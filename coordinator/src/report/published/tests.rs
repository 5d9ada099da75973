use super::super::Records;
use super::super::made::{self, float16, four_bit};
use super::*;
use domain::trial::GradientCheckpointing::{Off, On};

/// Trials as published, the base of 6,738,415,616 parameters.
fn trials() -> Vec<Trial> {
    let mut trials = vec![
        made::measured(1, float16(2, 16, 512), 17.3, 7.5),
        made::measured(2, four_bit(2, 16, 512), 7.8, 6.0),
        made::measured(3, float16(2, 16, 512), 14.6, 5.0),
        made::measured(4, float16(2, 16, 1024), 24.0, 3.8),
        made::unfit(5, float16(4, 16, 512), 45.0),
        made::unfit(6, float16(1, 16, 512), 20.0),
        made::measured(7, float16(2, 8, 512), 17.0, 7.6),
    ];
    for (trial, again) in trials.iter_mut().zip([Off, Off, On, Off, Off, Off, Off]) {
        trial.config.gradient_checkpointing = again;
        let layers = if again == On { 32 } else { 0 };
        trial.summary.iter_mut().for_each(|summary| summary.recomputed_layers = Some(layers));
    }
    trials[5].device = Some(made::device("V100-16GB", 15.5, 2.86));
    trials
}

fn shown(trials: &[Trial]) -> (Vec<String>, String) {
    let sweep = made::sweep();
    let sources = Sources::of(Records { sweep: &sweep, trials, curves: &[], items: &[] });
    let tables = blocks(&sources).into_iter().filter_map(|block| match block {
        Block::Table(table) => Some(table.rows),
        _ => None,
    });
    let row = |cells: &[Line]| cells.iter().map(Line::plain).collect::<Vec<_>>().join(" | ");
    let file = file(&sources).map(|(_, text)| text).unwrap_or_default();
    (tables.flatten().map(|of| row(&of.cells)).collect(), file)
}

#[test]
fn each_number_that_the_sweep_has_beside_the_published_one() {
    let (rows, file) = shown(&trials());
    for want in [
        "LoRA, float16 | lora_rank 16, max_sequence_length 512 | 28.2 GB | 17.3 GB | −39 % | 14.6 GB | −48 %",
        "LoRA, float16 | max_sequence_length 1024 | does not fit | 24 GB | fits here | – | –",
        "QLoRA, 4bit | lora_rank 16, max_sequence_length 512 | 7.57 GB | 7.8 GB | +3 % | – | –",
        "LoRA, float16 | A100-40GB | 2 | 2, not 4 | +0 | 2, the largest that was tried | +0",
        "LoRA, float16 | V100-16GB | none | none, not even 1 | the same | – | –",
        "LoRA, float16 | lora_rank 8 | ~5 rows/s | 7.6 rows/s | +52 % | – | –",
        "LoRA, float16 | A100-40GB | ~$1.00 | $0.67 | −33 % | $1.00 | 0 %",
        "trainable parameters | lora_rank 8 | 2.00e7 | 19\u{202F}988\u{202F}480 | −0.1 %",
        "adapter | lora_rank 16 | 152.65 MB | 159.9 MB | +4.8 %",
    ] {
        assert!(rows.iter().any(|row| row == want), "{want:?} is not among {rows:#?}");
    }
    assert!(!rows.iter().any(|row| row.contains("lora_rank 64") || row.contains("256")), "{rows:#?}");
    let line = "Peak memory,GB,\"LoRA, float16\",\"lora_rank 16, max_sequence_length 512\",true,28.2,14.6,";
    assert!(file.lines().any(|of| of.starts_with(line)), "{file}");
    assert!(
        file.lines().all(|line| line.split('"').step_by(2).collect::<String>().matches(',').count() == 7),
        "{file}"
    );
}

#[test]
fn accuracies_of_the_adapters_that_were_trained_as_long() {
    let mut trials = trials();
    made::answered(&mut trials[0], "arc_challenge", 60, 100);
    assert!(!shown(&trials).0.iter().any(|row| row.contains("ARC")), "500 steps are not 1,875");
    for trial in &mut trials[..1] {
        trial.summary.iter_mut().for_each(|summary| {
            summary.steps = 1875;
            summary.evaluations.iter_mut().for_each(|score| score.metric = "acc_norm".into());
        });
    }
    let (rows, _) = shown(&trials);
    for want in [
        "base, run again | ARC | 0.47 | 0.5000 (trial 1) | +0.03",
        "LoRA | ARC | 0.48 | 0.6000 ± 0.0100 (trial 1) | +0.12",
    ] {
        assert!(rows.iter().any(|row| row == want), "{want:?} is not among {rows:#?}");
    }
    assert!(!rows.iter().any(|row| row.starts_with("QLoRA |")), "{rows:#?}");
}

#[test]
fn which_base_it_is() {
    let parameters = |base: u64| {
        let mut trial = made::measured(1, float16(2, 16, 512), 17.3, 7.5);
        trial.summary.iter_mut().for_each(|s| s.total_parameters = base + s.trainable_parameters);
        trial
    };
    let by = |id: &str, trials: &[Trial]| Beside::of(id, &Facts::of(trials)).map(|beside| beside.by);
    for (id, trials, want) in [
        ("openlm-research/open_llama_7b", vec![], Some(Match::Name)),
        ("./OPEN_LLAMA_7B/", vec![parameters(6_738_415_616)], Some(Match::Name)),
        ("./model", vec![parameters(6_738_415_616)], Some(Match::Shape)),
        ("openlm-research/open_llama_7b", vec![parameters(260_032)], None),
        ("openlm-research/open_llama_3b", vec![], None),
        ("./model", vec![parameters(260_032)], None),
    ] {
        assert_eq!(by(id, &trials), want, "{id}");
    }
}
