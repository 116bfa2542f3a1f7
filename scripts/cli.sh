# The shell around every bash script: --help, arguments that it does not take, errors as one line. A script without
# arguments sources this file after its cd; one with arguments only where the first of them is -h or --help.
script=$0
[ -f "$script" ] || script=$OLDPWD/$0  # as it was called, before the script's cd

head_of() { sed -n '/^#!/d; /^#SBATCH/d; /^#/!q; s/^# \{0,1\}//p' "$1"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

case ${1:-} in
    '') ;;
    -h | --help)
        head_of "$script"
        case ${0##*/} in run_tests.sh) ;; run_*.sh) echo && head_of scripts/loop.sh ;; esac
        exit 0 ;;
    *) fail "unknown argument $1: settings come from the environment, as in NAME=value bash $0 (--help shows them)" ;;
esac
