# shellcheck shell=bash
# The batch scripts of this folder source this file. It runs a driver, and queues the job again where Slurm's time was up.

# drive COMMAND...: run the driver, and set `status` to its exit code.
#
# Slurm sends SIGUSR1 to the batch script before the time is up, and SIGTERM when it takes the job away. Both are handed on:
# the driver ends after the step under way, with a checkpoint and exit code 130.
drive() {
    time_is_up='' status=0
    "$@" &
    driver=$!
    trap 'time_is_up=yes; hand_on USR1' USR1
    trap 'hand_on TERM' TERM

    while :; do
        interrupted=''
        status=0
        wait "$driver" || status=$? # of the driver, or above 128 where a signal came first
        [ -n "$interrupted" ] || break
    done
}

hand_on() {
    interrupted=yes
    kill -s "$1" "$driver" 2>/dev/null || true # it may have ended just now
}

# end: queue the job again where the driver saved a checkpoint because the time was up; else end with the driver's exit code.
end() {
    # 138 is SIGUSR1 itself, which ends a driver that is not up yet
    if [ -n "$time_is_up" ] && { [ "$status" -eq 130 ] || [ "$status" -eq 138 ]; }; then
        echo "the time is up: job $SLURM_JOB_ID is queued again and goes on from its checkpoint"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$status"
}
