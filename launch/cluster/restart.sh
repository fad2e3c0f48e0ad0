#!/usr/bin/env bash
# Runs a launcher command again until the training is done.
#
#   restart.sh [-n TRIES] [-m MOST] [-w SECONDS] [-l SECONDS] [-g SECONDS] [-p] COMMAND...
#
#   -n  failures in a row after which it gives up (5)
#   -m  failures in all after which it gives up (50)
#   -w  wait before the next try; doubled from failure to failure, up to 300 s (10)
#   -l  a try that lasted so long was healthy: failures in a row are counted anew (600)
#   -g  told to stop: longest wait for what is left once the command itself has ended (300)
#   -p  pass code 75 up instead of starting again: a scheduler takes these hosts away
#
# By the command's exit code: 0 done. 75 preempted, and saved what there was: again, not counted. 2, 126, 127 an error
# of the settings or the command line, 130 interrupted: no further try. Any other: a failure, counted.
#
# SIGTERM, SIGINT and SIGUSR1 mean that this host goes away: the whole process group of the command gets SIGTERM, this
# script waits until the last process of it has ended, and there is no further try. Ranks on other hosts, which a
# launcher started over ssh, are not seen from here: they may end seconds later.
set -u

tries=5 most=50 wait_s=10 long_s=600 grace_s=300 pass_up=false
while getopts "n:m:w:l:g:p" option; do
  case $option in
    n) tries=$OPTARG ;;
    m) most=$OPTARG ;;
    w) wait_s=$OPTARG ;;
    l) long_s=$OPTARG ;;
    g) grace_s=$OPTARG ;;
    p) pass_up=true ;;
    *) exit 2 ;;
  esac
done
shift $((OPTIND - 1))
for name in tries most wait_s long_s grace_s; do
  if [[ ! ${!name} =~ ^[0-9]{1,9}$ ]]; then
    echo "restart.sh: error: -n, -m, -w, -l and -g take whole numbers of at most 9 digits, got '${!name}'" >&2
    exit 2
  fi
  printf -v "$name" %d "$((10#${!name}))" # 09 is nine, not an octal number
done
if (($# == 0)); then
  echo "restart.sh: error: which command? restart.sh [OPTIONS] COMMAND..., see the head of the script" >&2
  exit 2
fi

stopping=false told=false child="" sleeper=""

say() { echo "restart.sh: $*" >&2; }

stop() {
  stopping=true told=true
  # a launcher may die of the signal without telling its ranks, so all get it
  [[ -z $child ]] || kill -TERM -- "-$child" 2>/dev/null
  [[ -z $sleeper ]] || kill "$sleeper" 2>/dev/null
}
trap stop TERM INT USR1

# Processes of the command's group. A zombie has ended, though it stays until somebody asks for its code: in some
# containers the first process never does.
members() {
  local file line state parent group
  for file in /proc/[0-9]*/stat; do
    { read -r line <"$file"; } 2>/dev/null || continue
    read -r state parent group _ <<<"${line##*) }"
    [[ $group != "$child" || $state == [ZX] ]] || echo "${line%% *}"
  done
}

# Ranks may still be saving when their launcher is gone.
wait_for_members() {
  local left end=$((SECONDS + grace_s))
  while left=$(members) && [[ -n $left ]]; do
    if ((SECONDS >= end)); then
      say "still there ${grace_s} s after the command has ended: process ${left//$'\n'/, }; not waiting any longer"
      return
    fi
    sleep 0.2
  done
}

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
  ! $stopping || wait_for_members
  child=""
}

pause() { # a signal ends it at once, whenever it comes
  sleep "$1" &
  sleeper=$!
  ! $stopping || stop
  wait "$sleeper"
  sleeper=""
}

failures=0 in_all=0 next_wait=$wait_s
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
  failures=$((failures + 1)) in_all=$((in_all + 1))
  if ((failures >= tries || in_all >= most)); then
    say "failed with code $code, $failures times in a row, $in_all times in all: giving up"
    exit "$code"
  fi
  say "failed with code $code ($failures of $tries); starting again in $next_wait s"
  pause "$next_wait"
  next_wait=$((next_wait * 2 > 300 ? 300 : next_wait * 2))
done
say "told to stop"
exit "${code:-143}"
