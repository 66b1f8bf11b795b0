# shellcheck shell=bash
# The batch scripts of this folder source this file. It runs a driver, and queues the job again where Slurm's time was up.

# Slurm sends SIGUSR1 to the batch script before the time is up, and SIGTERM when it takes the job away. Both are handed on:
# the driver ends after the step under way, with a checkpoint and exit code 130.
time_is_up='' driver='' status=0
trap 'time_is_up=yes; hand_on USR1' USR1
trap 'hand_on TERM' TERM

# drive COMMAND...: run the driver, and set `status` to its exit code.
drive() {
    "$@" &
    driver=$!

    while :; do
        interrupted=''
        status=0
        wait "$driver" || status=$? # of the driver, or above 128 where a signal came first
        [ -n "$interrupted" ] || break
    done
}

hand_on() {
    if [ -z "$driver" ]; then # Ray is still being started
        status=130
        end
    fi
    interrupted=yes
    kill -s "$1" "$driver" 2>/dev/null || true # it may have ended just now
}

# end: queue the job again where the driver ended because the time was up; else end with the driver's exit code.
#
# A job that has not run for LEAST_SECONDS is not: it would end as early the next time, and so on, maybe without a checkpoint.
# Slurm sends the signal at once where the whole time is shorter than the seconds of --signal.
end() {
    # 138 is SIGUSR1 itself, which ends a driver that is not up yet
    if [ -n "$time_is_up" ] && { [ "$status" -eq 130 ] || [ "$status" -eq 138 ]; }; then
        if [ "$SECONDS" -lt "${LEAST_SECONDS:-1800}" ]; then
            echo "the time was up after $SECONDS s: job $SLURM_JOB_ID is not queued again. Submit it with a --time that is" \
                "half an hour or more above the seconds of --signal; LEAST_SECONDS=$SECONDS allows shorter jobs" >&2
            exit "$status"
        fi
        echo "the time is up: job $SLURM_JOB_ID is queued again, and goes on where its last checkpoint is"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$status"
}
