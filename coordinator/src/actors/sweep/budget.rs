//! A sweep's budget.

use domain::sweep::Budget;

/// Which part of a budget is spent, if any is.
pub(super) fn spent(budget: &Budget, cost_usd: f64, elapsed_seconds: f64) -> Option<String> {
    match (budget.max_cost_usd, budget.max_wall_clock_seconds) {
        (Some(most), _) if cost_usd >= most => Some(format!("max_cost_usd of ${most} is spent")),
        (_, Some(most)) if elapsed_seconds >= most => Some(format!("max_wall_clock of {most} s is spent")),
        _ => None,
    }
}

/// What a sweep's budget may be, for the metrics.
pub(super) const LEVELS: [&str; 4] = ["unlimited", "below_half", "above_half", "nearly_spent"];

/// How much of a budget is spent, as a place in [`LEVELS`].
pub(super) fn level(budget: &Budget, cost_usd: f64, elapsed_seconds: f64) -> usize {
    let share = |most: Option<f64>, used: f64| most.map(|most| used / most);
    let shares =
        [share(budget.max_cost_usd, cost_usd), share(budget.max_wall_clock_seconds, elapsed_seconds)];
    match shares.into_iter().flatten().reduce(f64::max) {
        None => 0,
        Some(share) if share < 0.5 => 1,
        Some(share) if share < 0.9 => 2,
        Some(_) => 3,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_much_of_a_budget_is_spent() {
        for (max_cost_usd, max_wall_clock_seconds, want) in [
            (None, None, "unlimited"),
            (Some(10.0), None, "below_half"),
            (Some(10.0), Some(100.0), "above_half"),
            (Some(2.0), Some(1000.0), "nearly_spent"),
        ] {
            let budget = Budget { max_cost_usd, max_wall_clock_seconds };
            assert_eq!(LEVELS[level(&budget, 2.0, 60.0)], want, "{budget:?}");
        }
    }

    #[test]
    fn the_part_of_a_budget_that_is_spent() {
        for (max_cost_usd, max_wall_clock_seconds, want) in [
            (None, None, None),
            (Some(2.5), Some(61.0), None),
            (Some(2.0), Some(60.0), Some("max_cost_usd of $2 is spent")),
            (None, Some(60.0), Some("max_wall_clock of 60 s is spent")),
        ] {
            let budget = Budget { max_cost_usd, max_wall_clock_seconds };
            assert_eq!(spent(&budget, 2.0, 60.0).as_deref(), want, "{budget:?}");
        }
    }
}
