#!/usr/bin/env bash
# What the tests of web pages need besides requirements-dev.txt: Chromium or Chrome, and npm packages.
set -euo pipefail
cd "$(dirname "$0")/.."
names='chromium chromium-browser google-chrome google-chrome-stable chrome'
# shellcheck disable=SC2086
if ! command -v $names > /dev/null && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium
fi
npm install --no-package-lock --no-audit --no-fund
