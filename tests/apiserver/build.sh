#!/bin/sh
# Build a kube-apiserver from Debian's source package into the file that is named; some minutes and 1.5 GB, which are given back.
#
# Needs the right to install packages. Debian's own Go is older than what newer Kubernetes asks for, and fits this version.
set -eu
result=$1
work=$(mktemp -d "${TMPDIR:-/tmp}/kube-apiserver-XXXXXX")
trap 'chmod -R u+w "$work"; rm -rf "$work"' EXIT
trap 'exit 143' TERM INT

apt-get update -qq
apt-get install -y -qq --no-install-recommends golang-go golang-github-modern-go-reflect2-dev dpkg-dev

# A list of sources of our own, so that the machine's stays as it is.
mkdir -p "$work/lists/partial" "$work/source" "$work/go/src/k8s.io"
if [ -e /etc/apt/sources.list.d/debian.sources ]; then
    sed 's/^Types: .*/Types: deb-src/' /etc/apt/sources.list.d/debian.sources > "$work/debian.sources"
else
    sed -n 's/^deb /deb-src /p' /etc/apt/sources.list > "$work/debian.list"
fi
set -- -o Dir::Etc::sourceparts=/dev/null -o "Dir::Etc::sourcelist=$(ls "$work"/debian.*)" -o "Dir::State::lists=$work/lists" -o APT::Sandbox::User=root
apt-get "$@" -qq update
(cd "$work/source" && apt-get "$@" -qq source --download-only kubernetes && tar -xzf kubernetes_*.orig.tar.gz)
mv "$work"/source/kubernetes-* "$work/go/src/k8s.io/kubernetes"
cd "$work/go/src/k8s.io/kubernetes"

# Its module file is of another Go; as a GOPATH it builds with what is vendored.
export GO111MODULE=off GOPATH="$work/go" GOCACHE="$work/cache" CGO_ENABLED=0 GOFLAGS=
# What is vendored of this one crashes under newer Go as soon as a webhook is called.
rm -rf vendor/github.com/modern-go/reflect2
cp -r /usr/share/gocode/src/github.com/modern-go/reflect2 vendor/github.com/modern-go/
rm -f vendor/github.com/modern-go/reflect2/*_test.go

# The one generated file that the source does not hold.
go build -o "$work/openapi-gen" k8s.io/kubernetes/vendor/k8s.io/kube-openapi/cmd/openapi-gen
for link in vendor/k8s.io/*; do
    if [ -L "$link" ]; then printf '%s/\n' "$link"; fi
done > "$work/roots"
marked=$(xargs grep -rl --include='*.go' '+k8s:openapi-gen=' cmd pkg < "$work/roots" || true)
inputs=$(printf '%s\n' "$marked" | xargs -n1 dirname | sort -u |
    grep -vE 'sample-apiserver|code-generator|testdata|_examples' | sed 's#^#k8s.io/kubernetes/#' | paste -sd, -)
"$work/openapi-gen" -h hack/boilerplate/boilerplate.generatego.txt -O zz_generated.openapi \
    -p k8s.io/kubernetes/pkg/generated/openapi --output-base "$work/go/src" -i "$inputs" -r /dev/null

nice go build -ldflags '-s -w' -o "$work/kube-apiserver" k8s.io/kubernetes/cmd/kube-apiserver
mkdir -p "$(dirname "$result")"
# A name that is there means a build that came to its end.
mv "$work/kube-apiserver" "$result.new"
mv "$result.new" "$result"
