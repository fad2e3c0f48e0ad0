#!/usr/bin/env bash
# Runs a launcher command again until the training is done.
#
#   restart.sh [-n TRIES] [-w SECONDS] [-l SECONDS] [-p] COMMAND...
#
#   -n  failures in a row after which it gives up (5)
#   -w  wait before the next try; doubled from failure to failure, up to 300 s (10)
#   -l  a try that lasted so long was healthy: failures are counted anew (600)
#   -p  pass code 75 up instead of starting again: a scheduler takes these hosts away
#
# By the command's exit code: 0 done. 75 preempted and saved: again, not counted. 2, 126, 127 an error of the settings
# or the command line, 130 interrupted: no further try. Any other: a failure, counted.
#
# SIGTERM, SIGINT and SIGUSR1 mean that this host goes away: the whole process group of the command gets SIGTERM, this
# script waits until the last process of it has ended, and there is no further try.
set -u

tries=5 wait_s=10 long_s=600 pass_up=false
while getopts "n:w:l:p" option; do
  case $option in
    n) tries=$OPTARG ;;
    w) wait_s=$OPTARG ;;
    l) long_s=$OPTARG ;;
    p) pass_up=true ;;
    *) exit 2 ;;
  esac
done
shift $((OPTIND - 1))
for number in "$tries" "$wait_s" "$long_s"; do
  if [[ ! $number =~ ^[0-9]+$ ]]; then
    echo "restart.sh: error: -n, -w and -l take whole numbers, got '$number'" >&2
    exit 2
  fi
done
if (($# == 0)); then
  echo "restart.sh: error: which command? restart.sh [-n TRIES] [-w SECONDS] [-l SECONDS] [-p] COMMAND..." >&2
  exit 2
fi

stopping=false told=false child=""

say() { echo "restart.sh: $*" >&2; }

stop() {
  stopping=true told=true
  # a launcher may die of the signal without telling its ranks, so all get it
  [[ -z $child ]] || kill -TERM -- "-$child" 2>/dev/null
}
trap stop TERM INT USR1

run() {
  set -m # a process group of its own
  "$@" </dev/null &
  child=$!
  set +m
  ! $stopping || stop # the signal came before there was somebody to tell
  while :; do
    told=false
    wait "$child"
    code=$?
    $told || break # else a signal ended the wait; bash still has the child's code
  done
  # ranks may still be saving when their launcher is gone
  while $stopping && kill -0 -- "-$child" 2>/dev/null; do sleep 0.2; done
  child=""
}

pause() {
  sleep "$1" &
  wait $! # a signal ends it at once
}

failures=0 next_wait=$wait_s
while ! $stopping; do
  since=$SECONDS
  run "$@"
  ((code != 0)) || exit 0
  $stopping && break
  case $code in
    75)
      ! $pass_up || exit 75
      failures=0 next_wait=$wait_s
      say "preempted; starting again in $wait_s s"
      pause "$wait_s"
      continue
      ;;
    2 | 126 | 127 | 130)
      say "ended with code $code, which another try does not change"
      exit "$code"
      ;;
  esac
  if ((SECONDS - since >= long_s)); then failures=0 next_wait=$wait_s; fi
  failures=$((failures + 1))
  if ((failures >= tries)); then
    say "failed with code $code, $failures times in a row: giving up"
    exit "$code"
  fi
  say "failed with code $code ($failures of $tries); starting again in $next_wait s"
  pause "$next_wait"
  next_wait=$((next_wait * 2 > 300 ? 300 : next_wait * 2))
done
say "told to stop"
exit "${code:-143}"
